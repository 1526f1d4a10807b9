"""Answer every question of a file, keep every answer, score.

    grace eval MODEL --data test.jsonl

The file has the rows of training; the last assistant turn is the gold answer. Nothing is skipped silently: a bad row
stops the evaluation (the budget of bad rows is 0), and the score states how many were scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grace_vlm.data.collate import Batch, collate
from grace_vlm.data.encode import Encoder, Sample
from grace_vlm.data.ledger import EVALUATION_MAX_BAD_FRACTION
from grace_vlm.data.pictures import Picture, PictureStore, patchify_of
from grace_vlm.data.reader import Preparer, RowReader
from grace_vlm.data.rows import IMAGE_MARKER, Fault, Row, RowFile
from grace_vlm.errors import DataError
from grace_vlm.evals.answers import is_correct
from grace_vlm.evals.generate import greedy
from grace_vlm.evals.statistics import wilson_interval
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.vision import VisionFeatures

PIXEL_BYTES = 1 << 29
"""Host memory for decoded pictures of an evaluation."""


@dataclass(frozen=True)
class Answer:
    """One question's outcome; ``row`` is its line in the file, ``image`` its first picture."""

    row: int
    id: str
    kind: str
    image: str | None
    question: str
    gold: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Score:
    """Accuracy with its 95 % Wilson interval (fractions), and per question kind {kind: [correct, total]}."""

    num_correct: int
    num_scored: int
    num_total: int
    accuracy: float
    low: float
    high: float
    kinds: dict[str, list[int]]


def score(answers: Sequence[Answer], num_total: int) -> Score:
    """Aggregate; ``num_total`` is the number of rows in the file."""
    num_correct = sum(answer.correct for answer in answers)
    kinds: dict[str, list[int]] = {}
    for answer in answers:
        tally = kinds.setdefault(answer.kind, [0, 0])
        tally[0] += answer.correct
        tally[1] += 1
    low, high = wilson_interval(num_correct, len(answers))
    accuracy = num_correct / len(answers) if answers else 0.0
    return Score(num_correct, len(answers), num_total, accuracy, low, high, dict(sorted(kinds.items())))


class QuestionFile:
    """The encoded questions of a file, for models that share a processor. Encoding is done once."""

    def __init__(self, path: Path, loaded: LoadedModel, root: Path | None = None, limit: int | None = None) -> None:
        rows = RowFile(path, root)
        config = loaded.model.config
        self.encoder = Encoder(loaded.processor, loaded.adapter, config)
        self.pictures = PictureStore(patchify_of(loaded.adapter, config, loaded.processor), PIXEL_BYTES)
        self.num_total = len(rows) if limit is None else min(limit, len(rows))
        # Grids are all that encoding needs of a picture; pixels are fetched when a model asks.
        self.preparer = Preparer(
            rows, self.encoder, self.pictures, max_tokens=1 << 20, keeps_features=lambda name: True
        )
        reader = RowReader(self.preparer, ledger=None, max_bad_fraction=EVALUATION_MAX_BAD_FRACTION)
        found = reader.read_many(range(self.num_total), as_prompt=True)
        self.entries: list[tuple[Row, Sample]] = [(row, sample) for row, sample, _ in found]

    def batch(self, chunk: Sequence[tuple[Row, Sample]], keeps_features: Callable[[str], bool]) -> Batch:
        """Left-padded prompts with their pictures; no pixels where the model keeps the tower's output."""
        self.preparer.keeps_features = keeps_features
        found = self.preparer.pictures_of([row for row, _ in chunk])
        pictures: list[Picture] = []
        for name in (name for row, _ in chunk for name in row.images):
            picture = found[name]
            if isinstance(picture, Fault):
                raise DataError(f"{name}: {picture.reason}; it was readable a moment ago")
            pictures.append(picture)
        lengths = [self.encoder.adapter.num_visual_tokens(self.encoder.config, picture.grid) for picture in pictures]
        pad = self.encoder.tokenizer.pad_token_id
        return collate([sample for _, sample in chunk], pictures, lengths, pad, "left")


def answer_all(
    loaded: LoadedModel,
    questions: QuestionFile,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    vision_bytes: int = 1 << 30,
    progress: Callable[[int, int], None] = lambda done, total: None,
    observe: Callable[[list[int], torch.Tensor], None] = lambda rows, logits: None,
) -> list[Answer]:
    """Greedy answers to every question, in file order.

    ``observe`` is given row numbers and the (B, V) FP32 logits of their first answer token.

    Questions are batched by prompt length, which wastes little padding; the batches depend on the file alone.
    """
    vision = VisionFeatures(loaded.adapter, loaded.model, vision_bytes)
    order = sorted(range(len(questions.entries)), key=lambda i: (questions.entries[i][1].num_tokens, i))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chunk = [questions.entries[i] for i in order[start : start + batch_size]]
        tokens, logits = greedy(loaded, vision, questions.batch(chunk, vision.keeps), max_new_tokens)
        observe([row.index for row, _ in chunk], logits)
        texts = loaded.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for (row, _), text in zip(chunk, texts, strict=True):
            answers[row.index] = _answer(row, text)
        progress(min(start + batch_size, len(order)), len(order))
    return [answers[row.index] for row, _ in questions.entries]


def _answer(row: Row, text: str) -> Answer:
    gold = row.turns[-1].text
    question = row.turns[-2].text.replace(IMAGE_MARKER, "").strip()
    kind = row.meta.get("kind", "")
    image = row.images[0] if row.images else None
    return Answer(row.index, row.id, kind, image, question, gold, text, is_correct(text, gold))


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """One JSON line an answer."""
    path.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers), encoding="utf-8")


def read_answers(path: Path) -> list[Answer]:
    """Inverse of ``write_answers``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Answer(**_object(line)) for line in lines if line]


def _object(line: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(line)
    return content
