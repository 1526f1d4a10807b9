"""What a cache of the teacher will be, from some of its rows: tokens, bytes, and hours of a GPU. No weights are read.

Rows are read as a build reads them, evenly over the file, so tokens and visual tokens are those of the rows; of a file
with no more than ``SAMPLED_ROWS`` they are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from grace_vlm.data.encode import IGNORE_INDEX
from grace_vlm.data.rows import Fault
from grace_vlm.losses.signal import triangle
from grace_vlm.train.cache_build import READ_ROWS, Progress, recipe_of_cache
from grace_vlm.train.cache_identity import Hidden
from grace_vlm.train.cache_shards import KEY_BYTES
from grace_vlm.train.config import Recipe
from grace_vlm.train.estimate import Load, TeacherPass, teacher_pass
from grace_vlm.train.open import TOY, describe, open_preparer, open_rows, open_teacher, open_without_weights

SAMPLED_ROWS = 256
_ROW_BYTES = KEY_BYTES + 4 * 8
"""Of the index: key, checksum, and counts of a row with one picture."""


@dataclass(frozen=True)
class CacheEstimate:
    """A cache that is to be made. ``num_sampled``: rows that were read. ``num_bytes``: the head included."""

    num_rows: int
    num_sampled: int
    tokens: int
    supervised_tokens: int
    num_bytes: int
    token_bytes: int
    work: TeacherPass


def estimate_cache(recipe: Recipe, hidden: Hidden, progress: Progress = lambda done, total: None) -> CacheEstimate:
    """The cache that this recipe would make.

    Raises:
        ConfigError: no teacher, or models that cannot be described.
    """
    recipe = recipe_of_cache(recipe)
    rows = open_rows(recipe)
    student = open_without_weights(recipe, rows)
    name = str(recipe.model.teacher)
    if name.startswith(TOY):
        loaded = open_teacher(recipe, student)
        assert loaded is not None
        teacher = loaded.model, loaded.adapter
    else:
        teacher = describe(name)
    preparer = open_preparer(recipe, student, rows, dtype=torch.bfloat16)
    indices = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLED_ROWS, len(rows))).round().astype(int)).tolist()
    tokens = supervised = visual = values = 0
    for first in range(0, len(indices), READ_ROWS):
        for found in preparer.prepare(indices[first : first + READ_ROWS]):
            if isinstance(found, Fault):
                continue
            _, sample, pictures = found
            tokens += sample.num_tokens
            supervised += int((sample.labels[1:] != IGNORE_INDEX).sum())
            seen = [student.adapter.num_visual_tokens(student.model.config, picture.grid) for picture in pictures]
            visual += sum(seen)
            values += sum(map(triangle, seen))
        progress(min(first + READ_ROWS, len(indices)), len(indices))
    share = len(rows) / len(indices)
    text = teacher[0].config.text_config
    # On a GPU a teacher computes in BF16, on a CPU in FP32; "auto" is taken for a GPU, where a cache is made.
    native_bytes = 4 if recipe.runtime.device == "cpu" else 2
    element_bytes = {"exact": native_bytes, "bf16": 2, "fp8": 1}[hidden]
    token_bytes = text.hidden_size * element_bytes + 4 + 4 * (hidden == "fp8")
    head_bytes = text.vocab_size * text.hidden_size * native_bytes
    row_bytes = supervised * token_bytes + 4 * values + len(indices) * _ROW_BYTES
    load = Load(max(1, round(tokens / len(indices))), round(visual / len(indices)), supervised / max(tokens, 1))
    return CacheEstimate(
        len(rows),
        len(indices),
        round(share * tokens),
        round(share * supervised),
        round(share * row_bytes) + head_bytes,
        token_bytes,
        teacher_pass(recipe, teacher, load, len(rows)),
    )
