"""Every random generator that a run draws from, as JSON: Python, NumPy, torch on the CPU, torch on each GPU.

No pickle. Words and bytes are hex strings, so that the state is exact and the file stays readable:

    python  {"version": 3, "words": "<625 words of 8 hex digits>", "gauss": null | float}
    numpy   {"key": "<624 words>", "pos": int, "has_gauss": 0 | 1, "gauss": float}      the global MT19937
    torch   "<bytes>"                                                                   the global CPU generator
    cuda    ["<bytes>", ...]                                                            one a device, in order

A generator that is not global (a sampler's own) belongs to the sampler's state.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from grace_vlm.errors import CheckpointError


def _words_to_hex(words: Any) -> str:
    return "".join(f"{int(word):08x}" for word in words)


def _hex_to_words(text: str) -> list[int]:
    return [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]


def _bytes_to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _hex_to_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def capture_rng() -> dict[str, Any]:
    """The states of now. ``restore_rng`` makes every later draw the same."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": _words_to_hex(words), "gauss": gauss},
        "numpy": {
            "key": _words_to_hex(numpy_state["state"]["key"]),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": _bytes_to_hex(torch.get_rng_state()),
        "cuda": [_bytes_to_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set every generator to a captured state.

    Raises:
        CheckpointError: a part is missing or damaged, or it was captured with another number of GPUs.
    """
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        if len(state["cuda"]) != num_devices:
            raise CheckpointError(
                f"the random state is of {len(state['cuda'])} GPUs, this machine has {num_devices}; "
                "resume on as many, or start a new run"
            )
        python, numpy_state = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(_hex_to_words(python["words"])), python["gauss"]))
        key = np.array(_hex_to_words(numpy_state["key"]), dtype=np.uint32)
        np.random.set_state(("MT19937", key, numpy_state["pos"], numpy_state["has_gauss"], numpy_state["gauss"]))
        torch.set_rng_state(_hex_to_bytes(state["torch"]))
        for device, text in enumerate(state["cuda"]):
            torch.cuda.set_rng_state(_hex_to_bytes(text), device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the random state of the checkpoint is damaged: {error!r}; use an earlier one"
        ) from error
