"""Publish or nothing, and exact resume. The only room that makes files durable."""

from grace_vlm.checkpoint.atomic import publish_folder, require_free_space, sweep_partials, write_json_atomic
from grace_vlm.checkpoint.lock import FolderLock
from grace_vlm.checkpoint.manifest import is_complete, verify_manifest, write_manifest
from grace_vlm.checkpoint.rng import capture_rng, restore_rng
from grace_vlm.checkpoint.store import TrainState, find_checkpoint, load_checkpoint, require_same, save_checkpoint

__all__ = [
    "FolderLock",
    "TrainState",
    "capture_rng",
    "find_checkpoint",
    "is_complete",
    "load_checkpoint",
    "publish_folder",
    "require_free_space",
    "require_same",
    "restore_rng",
    "save_checkpoint",
    "sweep_partials",
    "verify_manifest",
    "write_json_atomic",
    "write_manifest",
]
