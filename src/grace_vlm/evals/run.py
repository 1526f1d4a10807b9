"""Answer every question of a file, keep every answer, score.

    grace eval MODEL --data test.jsonl

The file has the rows of training; the last assistant turn is the gold answer. Nothing is skipped silently: a bad row
stops the evaluation (the budget of bad rows is 0), and the score states how many were scored.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grace_vlm.data.encode import Encoder, Sample
from grace_vlm.data.ledger import EVALUATION_MAX_BAD_FRACTION
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.reader import Preparer, RowReader
from grace_vlm.data.rows import IMAGE_MARKER, Fault, Row, RowFile
from grace_vlm.engine.cache import PAGE_TOKENS, pages_for
from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.engine.request import EngineImage, Prompt
from grace_vlm.engine.sampling import Choice, SamplingParams
from grace_vlm.errors import DataError
from grace_vlm.evals.answers import is_correct
from grace_vlm.evals.statistics import wilson_interval
from grace_vlm.models.load import LoadedModel
from grace_vlm.quant.scheme import QuantizedTensor

PIXEL_BYTES = 1 << 29
"""Host memory for decoded pictures of an evaluation."""
MAX_NEW_TOKENS = 16
EXACT = EngineOptions(cpu_activations="fp32")
"""What questions are answered with: the score is the model's, without what a CPU's rounding of activations changes."""
_READ_ROWS = 256


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
        encoder = Encoder(loaded.processor, loaded.adapter, config)
        patchify = patchify_of(loaded.adapter, config, loaded.processor)
        store = PictureStore(patchify, PIXEL_BYTES, with_digests=True)
        self.tokenizer = encoder.tokenizer
        self._rows = rows
        self.num_total = len(rows) if limit is None else min(limit, len(rows))
        # Grids are all that encoding needs of a picture.
        self._preparer = Preparer(rows, encoder, store, max_tokens=1 << 20, keeps_features=lambda name: True)
        reader = RowReader(self._preparer, ledger=None, max_bad_fraction=EVALUATION_MAX_BAD_FRACTION)
        self.entries: list[tuple[Row, Sample]] = []
        for start in range(0, self.num_total, _READ_ROWS):
            indices = range(start, min(start + _READ_ROWS, self.num_total))
            self.entries += [(row, sample) for row, sample, _ in reader.read_many(indices, as_prompt=True)]
        self._preparer.keeps_features = None

    def kinds_left_out(self) -> list[str]:
        """Kinds of rows that the file has and the first ``limit`` have none of, sorted; reads the rest of the file."""
        kinds = {row.meta.get("kind", "") for row, _ in self.entries}
        rest = itertools.islice(self._rows, self.num_total, None)
        return sorted({row.meta["kind"] for row in rest if isinstance(row, Row) and "kind" in row.meta} - kinds)

    def prompt(self, number: int) -> Prompt:
        """Of entry ``number``, with the pixels of its pictures."""
        row, sample = self.entries[number]
        found = self._preparer.pictures_of([row])
        images = []
        for name in row.images:
            picture = found[name]
            if isinstance(picture, Fault):
                raise DataError(f"{name}: {picture.reason}; it was readable a moment ago")
            assert picture.pixels is not None
            images.append(EngineImage(picture.grid, picture.pixels, picture.digest))
        return Prompt(sample.input_ids, sample.positions, sample.visual, images)

    def order(self) -> list[int]:
        """Entries, those of the same pictures one after the other: a picture is decoded and seen once, however little
        of pictures can be kept."""
        first: dict[tuple[str, ...], int] = {}
        for number, (row, _) in enumerate(self.entries):
            first.setdefault(row.images, number)
        return sorted(range(len(self.entries)), key=lambda number: (first[self.entries[number][0].images], number))


def open_engine(
    loaded: LoadedModel,
    codes: Mapping[str, QuantizedTensor],
    questions: QuestionFile,
    options: EngineOptions = EXACT,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Engine:
    """An engine for the questions: its cache has room for ``max_running`` of the longest, but no more than
    ``options.cache_tokens``, or for one that needs more.

    Raises:
        DataError: a question that is too long for the model.
    """
    row, sample = max(questions.entries, key=lambda entry: entry[1].num_tokens)
    most, limit = sample.num_tokens + max_new_tokens, loaded.model.config.get_text_config().max_position_embeddings
    if most > limit:
        raise DataError(
            f"row {row.index} ({row.id!r}) has a prompt of {sample.num_tokens:,} tokens and an answer may have "
            f"{max_new_tokens:,}; the model takes {limit:,} in all: shorten one of them"
        )
    room = pages_for(most) * PAGE_TOKENS
    cache_tokens = max(room, min(options.max_running * room, options.cache_tokens))
    return Engine(loaded, codes, replace(options, cache_tokens=cache_tokens))


def answer_all(
    engine: Engine,
    questions: QuestionFile,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    observe: Callable[[int, Choice], None] | None = None,
) -> list[Answer]:
    """Greedy answers to every question, in file order, of an engine that does nothing else meanwhile.

    ``observe`` is given row number and first token of each answer that has one, with its log-probability and entropy.

    Requests begin a few more at a time than run together, so that not all pictures need be in memory.
    """
    params = SamplingParams(max_new_tokens, logprobs=None if observe is None else 0)
    entries, order = questions.entries, questions.order()
    source, running = iter(order), dict[str, list[int]]()
    answers: dict[int, Answer] = {}
    try:
        while len(answers) < len(order):
            for number in itertools.islice(source, 2 * engine.options.max_running - len(running)):
                engine.add(str(number), questions.prompt(number), params)
                running[str(number)] = []
            for event in engine.step():
                number, tokens = int(event.request_id), running[event.request_id]
                if event.choice is not None:
                    if observe is not None and not tokens:
                        observe(entries[number][0].index, event.choice)
                    tokens.append(event.choice.token)
                if event.finish:
                    text = questions.tokenizer.decode(running.pop(event.request_id), skip_special_tokens=True)
                    answers[number] = _answer(entries[number][0], text)
            progress(len(answers), len(order))
    finally:
        for name in running:
            engine.cancel(name)
    return [answers[number] for number in range(len(entries))]


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
