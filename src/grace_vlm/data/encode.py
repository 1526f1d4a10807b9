"""From a row to token ids, labels and positions, with no picture decoded.

The ids are those of Transformers' processor for the same messages, token for token (tests/data/test_templates.py asks
it for every family). Texts are stripped of white space at both ends first, as LLaVA's own training code does.

Labels stand on the assistant's answers only, through the special token that closes each (``<|im_end|>``, ``</s>``);
everything else is -100. A template that closes answers with nothing but a space (llava-hf's) gets the tokenizer's
end-of-sequence token in its place after the last one, or no model would learn to stop: the one place where the ids
differ from the processor's.

The chat template is rendered once per conversation *shape* with placeholders for the texts, and the texts are put in;
where an answer stands is known by its characters. So a text that contains "assistant" is text, and labels never depend
on finding a token id in the stream. (The reference starts supervision at any token 77091, "assistant", inside user text
too.) A text that contains a special token's own characters, "<|im_end|>", is tokenized apart, as text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from grace_vlm.data.rows import IMAGE_MARKER, Row, Turn
from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import Adapter, Grid

IGNORE_INDEX = -100
_SLOT = re.compile("\ue000(\\d+)\ue001")
"""Placeholders of private-use characters; they never reach a tokenizer."""
_MAX_SHAPES = 512


@dataclass(frozen=True)
class Sample:
    """One encoded row.

    Args:
        row_index, row_id: what ledger lines and errors name.
        input_ids: (S,) int64. labels: (S,) int64, -100 where nothing is supervised, not shifted.
        positions: (3, S) int64. images: pictures in order, as named in the row.
        visual: (n_visual,) int64, where its visual tokens stand.
    """

    row_index: int
    row_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    images: tuple[str, ...]
    visual: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


class _Piece(NamedTuple):
    """A part of a rendered conversation: the template's own text, or the number of a person's text."""

    text: str
    slot: int | None
    is_answer: bool


class Encoder:
    """Encodes rows for one processor and the configuration of one model. Holds no weights: workers take a copy."""

    def __init__(self, processor: Any, adapter: Adapter, config: Any) -> None:
        self.processor, self.adapter, self.config = processor, adapter, config
        self.tokenizer = processor.tokenizer
        self.image_token_id = adapter.image_token_id(config)
        special = {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = np.array(sorted(special), dtype=np.int64)
        self._special_text = re.compile("|".join(re.escape(text) for text in special.values() if text) or r"(?!)")
        self._shapes: dict[tuple[Any, ...], tuple[_Piece, ...]] = {}

    def encode(self, row: Row, grids: Sequence[Grid]) -> Sample:
        """The whole conversation, with labels."""
        return self._encode(row, grids, with_answer=True)

    def prompt(self, row: Row, grids: Sequence[Grid]) -> Sample:
        """Everything up to the last answer, and the opening of the assistant's turn."""
        return self._encode(row, grids, with_answer=False)

    def prompt_of(self, parts: Sequence[str | None], grids: Sequence[Grid]) -> Sample:
        """One turn of the user's, texts to the last space as they are given and None for each picture, and the opening
        of the assistant's turn."""
        texts = [part for part in parts if part]
        kinds = tuple("image" if part is None else "text" for part in parts if part != "")
        is_plain = not any(map(self._special_text.search, texts))
        names = tuple(f"picture {number}" for number in range(1, len(grids) + 1))
        return self._sample(Row(0, "prompt", names, ()), (("user", kinds),), texts, is_plain, grids, with_answer=False)

    def _encode(self, row: Row, grids: Sequence[Grid], with_answer: bool) -> Sample:
        shape, texts = _shape_of(row.turns if with_answer else row.turns[:-1])
        # Of the whole row, so that its prompt is cut like the row itself.
        is_plain = not any(self._special_text.search(turn.text.replace(IMAGE_MARKER, "")) for turn in row.turns)
        return self._sample(row, shape, texts, is_plain, grids, with_answer)

    def _sample(
        self,
        row: Row,
        shape: tuple[tuple[str, tuple[str, ...]], ...],
        texts: Sequence[str],
        is_plain: bool,
        grids: Sequence[Grid],
        with_answer: bool,
    ) -> Sample:
        pieces = self._pieces(shape, with_answer)
        ids, supervised = self._tokenize(pieces, texts) if is_plain else self._tokenize_apart(pieces, texts)
        if with_answer:
            ids, supervised = self._closed(ids, supervised)
        is_image = ids == self.image_token_id
        if is_image.sum() != len(grids):
            raise ConfigError(
                f"the chat template writes {is_image.sum()} image tokens for {len(grids)} images; "
                "the processor's template and the model's image token do not belong together"
            )
        counts = np.ones(len(ids), dtype=np.int64)
        counts[is_image] = [self.adapter.num_visual_tokens(self.config, grid) for grid in grids]
        input_ids, supervised = np.repeat(ids, counts), np.repeat(supervised, counts)
        labels = np.where(supervised, input_ids, IGNORE_INDEX)
        positions = self.adapter.positions(self.config, input_ids, grids)
        visual = np.flatnonzero(input_ids == self.image_token_id)
        return Sample(row.index, row.id, input_ids, labels, positions, row.images, visual)

    def _closed(self, ids: np.ndarray, supervised: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """With the end-of-sequence token right after the last answer if the template closes it with nothing.

        White space that the template writes there goes: the end must follow from the answer's last token.
        """
        last = supervised.nonzero()[0][-1]
        if np.isin(ids[last], self._special_ids):
            return ids, supervised
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError("the chat template does not close an answer and the tokenizer has no eos_token; set one")
        if not self.tokenizer.decode(ids[last + 1 :].tolist()).strip():
            ids, supervised = ids[: last + 1], supervised[: last + 1]
        return np.append(ids, end), np.append(supervised, True)

    def _pieces(self, shape: tuple[tuple[str, tuple[str, ...]], ...], with_answer: bool) -> tuple[_Piece, ...]:
        """What the chat template makes of a conversation shape."""
        key = (shape, with_answer)
        if key not in self._shapes:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._render(shape, with_answer)
        return self._shapes[key]

    def _render(self, shape: tuple[tuple[str, tuple[str, ...]], ...], with_answer: bool) -> tuple[_Piece, ...]:
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
        pieces = []
        for position, text in enumerate(_SLOT.split(rendered)):
            slot = int(text) if position % 2 else None
            pieces.append(_Piece("" if position % 2 else text, slot, slot in answers))
        if sorted(piece.slot for piece in pieces if piece.slot is not None) != list(range(number)):
            raise ConfigError("the chat template leaves out or repeats a text of the conversation; it cannot be used")
        return tuple(pieces)

    def _add_special_tokens(self, text: str) -> bool:
        """As Transformers' processors decide: a template that writes the first token itself gets no second one."""
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _tokenize(self, pieces: Sequence[_Piece], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, supervised) of the rendered conversation, tokenized as one string."""
        parts, spans, at = [], [], 0
        for piece in pieces:
            text = piece.text if piece.slot is None else texts[piece.slot]
            if piece.is_answer:
                spans.append((at, at + len(text)))
            parts.append(text)
            at += len(text)
        whole = "".join(parts)
        found = self.tokenizer(
            whole, add_special_tokens=self._add_special_tokens(whole), return_offsets_mapping=True, verbose=False
        )
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        begins, ends = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        supervised = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            supervised |= (ends > begin) & (begins < end)
            supervised |= (begins == end) & (ends > begins) & np.isin(ids, self._special_ids)
        return ids, supervised

    def _tokenize_apart(self, pieces: Sequence[_Piece], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same for texts that hold a special token's characters: every piece by itself, texts as text."""
        ids: list[int] = []
        supervised: list[bool] = []
        after_answer = False
        for piece in pieces:
            if piece.slot is not None:
                new = self.tokenizer(texts[piece.slot], add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
            else:
                is_first = not ids and bool(piece.text) and self._add_special_tokens(piece.text)
                new = self.tokenizer(piece.text, add_special_tokens=is_first)["input_ids"] if piece.text else []
            closes = after_answer and bool(new) and new[0] in self._special_ids
            supervised.extend(piece.is_answer or (closes and number == 0) for number in range(len(new)))
            ids.extend(new)
            after_answer = piece.is_answer
        return np.asarray(ids, dtype=np.int64), np.asarray(supervised, dtype=bool)


def _shape_of(turns: Sequence[Turn]) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], list[str]]:
    """(role and kinds of parts of every turn, the texts in order): what the template sees, and what it does not."""
    shape: list[tuple[str, tuple[str, ...]]] = []
    texts: list[str] = []
    for turn in turns:
        kinds: list[str] = []
        for number, part in enumerate(turn.text.split(IMAGE_MARKER)):
            if number:
                kinds.append("image")
            if part := part.strip():
                kinds.append("text")
                texts.append(part)
        shape.append((turn.role, tuple(kinds)))
    return tuple(shape), texts
