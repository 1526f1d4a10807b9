"""What a row is to a model, in 32 bytes: its tokens, labels and positions, and the pixels of its pictures.

Two rows with one key get the same answer from any frozen model, whatever batch they stand in, so what a teacher said
can be kept by it (train/teacher_cache.py). Names and ids of rows are no part of it: a file that was renamed or rows
that were mixed anew keep their keys, and a picture that was edited does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from grace_vlm.data.encode import Sample
from grace_vlm.models.adapter import Grid


def pixels_digest(grid: Grid, pixels: torch.Tensor) -> bytes:
    """sha256 of a picture as the tower sees it: grid, shape, and values in BF16.

    BF16 tells the 256 levels of an 8-bit picture apart after the usual normalisations, and is what a GPU is given:
    the digest is the same for workers that hand over FP32.
    """
    values = pixels.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    found = hashlib.sha256(np.array([*grid, *values.shape], dtype="<i8").tobytes())
    found.update(values.data)
    return found.digest()


def row_key(sample: Sample, picture_digests: Sequence[bytes]) -> bytes:
    """sha256 of an encoded row and its pictures in order."""
    found = hashlib.sha256(np.array([sample.num_tokens, len(picture_digests)], dtype="<i8").tobytes())
    for numbers in (sample.input_ids, sample.labels, sample.positions):
        found.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
    for digest in picture_digests:
        found.update(digest)
    return found.digest()
