"""What a row is to a model, in 32 bytes: its tokens, labels and positions, and the pixels of its pictures.

Two rows with one key get the same answer from any frozen model, up to the rounding of the batch they stand in, so what
a teacher said can be kept by it (train/teacher_cache.py). Names and ids of rows are no part of it: a file that was
renamed or rows that were mixed anew keep their keys, and a picture that was edited does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from grace_vlm.data.encode import Sample
from grace_vlm.models.adapter import Grid


def pixels_digest(grid: Grid, pixels: torch.Tensor) -> bytes:
    """sha256 of a picture as the tower sees it: grid, shape, and values in the dtype that they have.

    Not in a narrower one: CLIP's normalisation reaches values where a step of BF16 is wider than one of the 256 levels
    of an 8-bit picture, and two pictures would share a digest that an FP32 tower tells apart.
    """
    shape = np.array([*grid, pixels.element_size(), *pixels.shape], dtype="<i8")
    found = hashlib.sha256(shape.tobytes())
    found.update(pixels.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def row_key(sample: Sample, picture_digests: Sequence[bytes]) -> bytes:
    """sha256 of an encoded row and its pictures in order."""
    found = hashlib.sha256(np.array([sample.num_tokens, len(picture_digests)], dtype="<i8").tobytes())
    for numbers in (sample.input_ids, sample.labels, sample.positions):
        found.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
    for digest in picture_digests:
        found.update(digest)
    return found.digest()
