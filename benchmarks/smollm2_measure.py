"""What a model of the SmolLM2 pair knows: seven toy benchmarks, held-out questions, plain text.

Questions are encoded, and pictures decoded, once for all models: they share a processor. A model is asked as
bf16(q s), whatever kernels there are for its grid, so that widths differ in nothing but their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.rows import Row
from grace_vlm.engine.cache import PAGE_TOKENS, pages_for
from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.engine.request import EngineImage, Prompt
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.evals.answers import is_correct
from grace_vlm.evals.perplexity import read_windows, score_text
from grace_vlm.evals.run import QuestionFile
from grace_vlm.evals.suite.ledger import Reply
from grace_vlm.evals.suite.questions import Benchmark, Question, picture_bytes
from grace_vlm.evals.suite.run import SUITES, questions_of, read_benchmarks
from grace_vlm.evals.suite.score import score
from grace_vlm.evals.tasks.task import Profile
from grace_vlm.media.image import take_image
from grace_vlm.models.load import LoadedModel

MAX_RUNNING, MAX_NEW_TOKENS = 128, 16
PROFILES: tuple[Profile, ...] = ("lmms", "strict")
"""The first that a benchmark has is its own: lmms asks as LLaVA's training rows do; HallusionBench has strict only."""


@dataclass(frozen=True)
class Exam:
    """What is asked.

    Args:
        suite: folder of ``grace data prepare toy-suite``, None to leave it out. questions: a file of rows, None too.
        texts: name -> file. window: its tokens. limit: of questions of each benchmark, of the file, and windows of each
            text; None for all. first_window: of each text, those before it are left out. is_asked: which questions of
            the file, by number; None for all.
    """

    suite: Path | None
    questions: Path | None
    texts: dict[str, Path]
    window: int = 512
    limit: int | None = None
    first_window: int = 0
    is_asked: Callable[[int], bool] | None = None


class Examination:
    """An exam, prepared for the models of one processor.

    Args:
        loaded: any of them.
    """

    def __init__(self, exam: Exam, loaded: LoadedModel) -> None:
        self.exam = exam
        self.tokenizer = loaded.processor.tokenizer
        self.benchmarks: list[Benchmark] = []
        self.asked: list[tuple[Question, Prompt]] = []
        if exam.suite is not None:
            self.benchmarks = read_benchmarks(SUITES["card"], exam.suite, exam.limit, True, MAX_NEW_TOKENS)[0]
            ask = prompter(loaded)
            self.asked = [
                (question, ask(question))
                for one in self.benchmarks
                for question in questions_of([one], [profile_of(one)])
            ]
        self.rows: dict[int, tuple[Row, Prompt]] = {}
        self.num_rows = 0
        if exam.questions is not None:
            file = QuestionFile(exam.questions, loaded, limit=exam.limit)
            self.num_rows = len(file.entries)
            chosen = [number for number in file.order() if exam.is_asked is None or exam.is_asked(number)]
            self.rows = dict(sorted((number, (file.entries[number][0], file.prompt(number))) for number in chosen))
        self.windows = {name: self._windows(path) for name, path in exam.texts.items()}

    def _windows(self, path: Path) -> list[Any]:
        first, limit = self.exam.first_window, self.exam.limit
        return read_windows(path, self.tokenizer, self.exam.window, None if limit is None else first + limit)[first:]

    def of(self, loaded: LoadedModel, reference: LoadedModel | None = None) -> dict[str, Any]:
        """Everything that is asked of a model, ready for JSON.

        Args:
            reference: what its words are compared with on the texts.
        """
        texts = {name: dataclasses.asdict(score_text(loaded, own, reference)) for name, own in self.windows.items()}
        suite: dict[str, Any] = {}
        rows: dict[str, Any] = {}
        if self.asked or self.rows:
            prompts = [prompt for _, prompt in (*self.asked, *self.rows.values())]
            answers = self._answers(loaded, prompts)
            suite = self._suite(answers[: len(self.asked)])
            rows = self._questions(answers[len(self.asked) :])
        return {"suite": suite, "questions": rows, "texts": texts}

    def _answers(self, loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[str]:
        room = pages_for(max(len(prompt.ids) for prompt in prompts) + MAX_NEW_TOKENS) * PAGE_TOKENS
        options = EngineOptions(
            cache_tokens=MAX_RUNNING * room, max_running=MAX_RUNNING, max_step_tokens=8192, cpu_activations="fp32"
        )
        engine = Engine(loaded, {}, options)
        tokens: list[list[int]] = [[] for _ in prompts]
        waiting, params = iter(enumerate(prompts)), SamplingParams(MAX_NEW_TOKENS)
        running = 0
        while True:
            for number, prompt in _next(waiting, 2 * MAX_RUNNING - running):
                engine.add(str(number), prompt, params)
                running += 1
            if not engine.has_work:
                break
            for event in engine.step():
                if event.choice is not None:
                    tokens[int(event.request_id)].append(event.choice.token)
                running -= event.finish is not None
        return [self.tokenizer.decode(own, skip_special_tokens=True) for own in tokens]

    def _suite(self, answers: Sequence[str]) -> dict[str, Any]:
        replies = {
            question.key: Reply(question.key, question.task, question.doc_id, text, "stop", None, "", (), None, 0.0)
            for (question, _), text in zip(self.asked, answers, strict=True)
        }
        found = {}
        for one in self.benchmarks:
            lines, report = score(one, profile_of(one), replies)
            metric = report.metrics[report.headline]
            found[one.task.about.name] = {
                "metric": report.headline,
                "value": metric.value,
                "unparsed": report.num_unparsed,
                "scores": [round(float(line["score"]), 4) for line in lines],
            }
        return found

    def _questions(self, answers: Sequence[str]) -> dict[str, Any]:
        """Right or wrong, a character a row in the order of the file (``-`` where it was not asked), and right answers
        by kind."""
        marks, kinds = ["-"] * self.num_rows, dict[str, list[int]]()
        for (number, (row, _)), text in zip(self.rows.items(), answers, strict=True):
            flag = is_correct(text, row.turns[-1].text)
            marks[number] = "01"[flag]
            tally = kinds.setdefault(row.meta.get("kind", ""), [0, 0])
            tally[0] += flag
            tally[1] += 1
        return {"correct": "".join(marks), "kinds": kinds}


def profile_of(benchmark: Benchmark) -> Profile:
    """How a benchmark is asked here."""
    return benchmark.known(PROFILES)[0]


def prompter(loaded: LoadedModel) -> Callable[[Question], Prompt]:
    """Makes prompts for a model's processor; its weights are not used."""
    config = loaded.model.config
    encoder = Encoder(loaded.processor, loaded.adapter, config)
    pictures = PictureStore(patchify_of(loaded.adapter, config, loaded.processor), with_digests=True)

    def ask(question: Question) -> Prompt:
        images = []
        for number, data in enumerate(picture_bytes(question)):
            picture = pictures.add(f"{question.key}/{number}", take_image(data))
            assert picture.pixels is not None
            images.append(EngineImage(picture.grid, picture.pixels, picture.digest))
        sample = encoder.prompt_of(
            [part if isinstance(part, str) else None for part in question.parts], [image.grid for image in images]
        )
        return Prompt(sample.input_ids, sample.positions, sample.visual, images)

    return ask


def _next(source: Iterator[tuple[int, Prompt]], count: int) -> Iterator[tuple[int, Prompt]]:
    for _ in range(count):
        one = next(source, None)
        if one is None:
            return
        yield one
