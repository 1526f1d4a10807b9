"""A run's diary: one JSON line a step in ``metrics.jsonl``, and the trackers a user asked for.

On resume, lines of steps that the checkpoint has not seen are cut off, so that the file reads as one run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from grace_vlm.checkpoint.atomic import write_bytes_atomic
from grace_vlm.errors import ConfigError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Recorder:
    """Appends to ``metrics.jsonl``; ``first_step`` > 0 keeps only earlier lines first."""

    def __init__(self, run: Path, first_step: int, trackers: Sequence[str], config: dict[str, Any]) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] < first_step]
        # In one step: a kill here must not cost the lines of before.
        write_bytes_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = [_open_tracker(name, run, config) for name in trackers]

    def add(self, line: dict[str, Any]) -> None:
        """Write one line; it reaches the file system at once."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
            tracker.log(numbers, step=line["step"])

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def _open_tracker(name: str, run: Path, config: dict[str, Any]) -> GeneralTracker:
    classes = {"tensorboard": TensorBoardTracker, "wandb": WandBTracker}
    try:
        if name == "tensorboard":
            tracker = classes[name](run_name=run.name, logging_dir=str(run / "tensorboard"))
        else:
            tracker = classes[name](run_name=run.name)
        tracker.start()
    except ImportError as error:
        raise ConfigError(f"tracker {name} is not installed; pip install {name}") from error
    return tracker
