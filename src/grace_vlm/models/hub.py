"""Is a model on the hub? Asked once, before Transformers asks.

The hub's client repeats a request that could not be made five times, over 23 seconds, for every file. A misspelt name
on a machine without the internet must not take that long.
"""

from __future__ import annotations

from pathlib import Path

from grace_vlm.errors import ConfigError

HUB_SECONDS = 5.0
"""Until a hub that says nothing is taken for unreachable."""
CONFIG = ("config.json",)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def require_on_hub(name: str, files: tuple[str, ...]) -> None:
    """Nothing, if ``name`` is a folder, or a model (org/name) that the hub has, or its cache one of ``files`` of it.

    Raises:
        ConfigError: the hub has no such model, shows it to others only, or cannot be reached.
    """
    if Path(name).is_dir():
        return
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError  # HTTPError: httpx's

    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{name} is no folder here, and no model on the hub or a private one; check the name, or log in with "
            "hf auth login"
        ) from None
    except (HTTPError, OSError, ValueError) as error:  # ValueError: no name that the hub would give
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else str(error).split("\n", 1)[0]
        raise ConfigError(
            f"{name} is no folder here and not in the hub's cache, and {constants.ENDPOINT} gives nothing "
            f"({reason}); check the name and the connection, or give a model folder"
        ) from error
