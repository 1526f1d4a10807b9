"""From a row to token ids, labels and positions, with no picture decoded.

Labels stand on the assistant's answers only, through the ``<|im_end|>`` that closes each; everything else is -100.
The chat template is rendered once per conversation *shape* with placeholders for the texts, cut at them, and the
pieces are tokenized apart: the template's own pieces with special tokens, people's texts without. So a text that
contains "<|im_end|>" or "assistant" is text, and labels never depend on finding a token id in the stream. (The
reference starts supervision at any token 77091, "assistant", inside user text too.)

For texts without leading or trailing white space, which is stripped, the ids equal the processor's own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_vlm.data.rows import IMAGE_MARKER, Row
from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import Adapter, Grid

IGNORE_INDEX = -100
_SLOT = re.compile("\ue000(\\d+)\ue001")
"""Placeholders of private-use characters; they never reach a tokenizer."""


@dataclass(frozen=True)
class Sample:
    """One encoded row.

    Args:
        row_index, row_id: what ledger lines and errors name.
        input_ids: (S,) int64. labels: (S,) int64, -100 where nothing is supervised, not shifted.
        positions: (3, S) int64. images: pictures in order, as named in the row.
    """

    row_index: int
    row_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    images: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Encodes rows for one processor and model."""

    def __init__(self, processor: Any, adapter: Adapter, model: Any) -> None:
        self.processor, self.adapter, self.model = processor, adapter, model
        self.tokenizer = processor.tokenizer
        self.image_token_id = adapter.image_token_id(model)
        self.end_token = "<|im_end|>"
        self._shape_pieces = functools.lru_cache(maxsize=512)(self._render_shape)
        # Short questions repeat in their thousands; a tokenizer call costs 150 us.
        self._text_ids = functools.lru_cache(maxsize=16384)(self._tokenize_text)

    def encode(self, row: Row, grids: Sequence[Grid]) -> Sample:
        """The whole conversation, with labels."""
        return self._encode(row, grids, with_answer=True)

    def prompt(self, row: Row, grids: Sequence[Grid]) -> Sample:
        """Everything up to the last answer, and the opening of the assistant's turn."""
        return self._encode(row, grids, with_answer=False)

    def _encode(self, row: Row, grids: Sequence[Grid], with_answer: bool) -> Sample:
        turns = row.turns if with_answer else row.turns[:-1]
        shape: list[tuple[str, tuple[str, ...]]] = []
        texts: list[str] = []
        for turn in turns:
            before, marker, after = turn.text.partition(IMAGE_MARKER)
            parts = [(before.strip(), "text"), ("", "image" if marker else ""), (after.strip(), "text")]
            kept = tuple(kind for text, kind in parts if kind == "image" or text)
            texts.extend(text for text, kind in parts if kind == "text" and text)
            shape.append((turn.role, kept))
        images = (row.image,) if row.image is not None else ()
        ids: list[int] = []
        labels: list[int] = []
        tokens_per_image = iter([self.adapter.num_visual_tokens(self.model, grid) for grid in grids])
        for piece, supervised in self._shape_pieces(tuple(shape), with_answer):
            if isinstance(piece, int):
                new: list[int] = list(self._text_ids(texts[piece]))
            else:
                new = []
                for token in piece:
                    new.extend([token] * next(tokens_per_image) if token == self.image_token_id else [token])
            ids.extend(new)
            labels.extend(new if supervised else [IGNORE_INDEX] * len(new))
        input_ids = np.asarray(ids, dtype=np.int64)
        positions = self.adapter.positions(self.model, input_ids, grids)
        return Sample(row.index, row.id, input_ids, np.asarray(labels, dtype=np.int64), positions, images)

    def _render_shape(
        self, shape: tuple[tuple[str, tuple[str, ...]], ...], with_answer: bool
    ) -> tuple[tuple[int | tuple[int, ...], bool], ...]:
        """Pieces of a conversation shape: a text's number, or template token ids; and whether it is supervised."""
        messages, number, answers = [], 0, set()
        for role, parts in shape:
            content: list[dict[str, str]] = []
            for kind in parts:
                if kind == "image":
                    content.append({"type": "image"})
                    continue
                content.append({"type": "text", "text": f"\ue000{number}\ue001"})
                if role == "assistant":
                    answers.add(number)
                number += 1
            messages.append({"role": role, "content": content})
        rendered = self.processor.apply_chat_template(messages, add_generation_prompt=not with_answer, tokenize=False)
        pieces: list[tuple[int | tuple[int, ...], bool]] = []
        after_answer = False
        for position, text in enumerate(_SLOT.split(rendered)):
            if position % 2:
                after_answer = int(text) in answers
                pieces.append((int(text), after_answer))
                continue
            if after_answer:
                if not text.startswith(self.end_token):
                    raise ConfigError(f"the chat template does not close an answer with {self.end_token}")
                pieces.append((self._template_ids(self.end_token), True))
                text = text[len(self.end_token) :]
            if text:
                pieces.append((self._template_ids(text), False))
        return tuple(pieces)

    def _tokenize_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _template_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
