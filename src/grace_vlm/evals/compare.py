"""Several models, the same questions: what a report is made of.

Every model answers every question; answers are kept. Each row of the result has its accuracy with an interval, its
size, its agreement with the baseline and the paired difference to it. ``render_report`` (report.py) reads the result.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from grace_vlm.checkpoint.atomic import make_folder, write_json_atomic
from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.open import open_model
from grace_vlm.engine.sampling import Choice
from grace_vlm.evals.run import EXACT, Answer, QuestionFile, Score, answer_all, open_engine, score, write_answers
from grace_vlm.evals.statistics import mcnemar_p, paired_difference
from grace_vlm.formats.registry import read_model
from grace_vlm.formats.weights import weight_bytes
from grace_vlm.losses.gdkd import gate_of_entropy
from grace_vlm.models.load import LoadedModel

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contestant:
    """One model of a comparison.

    Args:
        name: key of the row, and of its answers file. label: what a reader sees.
        path: model, run or packed folder. method, scheme: for the table.
        metrics: its training diary, if it was trained here.
    """

    name: str
    label: str
    path: Path
    method: str
    scheme: str
    metrics: Path | None = None


def bits_per_weight(folder: Path, num_parameters: int) -> float:
    """Mean bits a parameter costs once packed: codes and scales of the grid, 16 for the rest."""
    entries = read_model(folder).linears.values()
    on_grid = sum(entry.out_features * entry.in_features for entry in entries)
    return (8 * sum(entry.stored_bytes for entry in entries) + 16 * (num_parameters - on_grid)) / num_parameters


def layer_errors(model: Any, base: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """||W - W_base|| / ||W_base|| of every decoder linear against the baseline's, by module name."""
    errors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name in base:
            reference = base[name]
            errors[name] = float((module.weight.detach().float() - reference).norm() / reference.norm())
    return errors


def hardware() -> str:
    """The machine in words: what a number was measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    return f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads"


class Comparison:
    """Asks contestants one after the other and collects the result.

    Args:
        data: rows with one question each. out: where answers and ``results.json`` go.
        baseline: name of the contestant that others are compared with. teacher: whose gate is recorded, if any.
        options: of the engine that answers.
    """

    def __init__(
        self,
        data: Path,
        out: Path,
        baseline: str,
        teacher: str | None,
        say: Say = lambda text: None,
        options: EngineOptions = EXACT,
    ) -> None:
        self.data, self.out, self.baseline, self.teacher, self.say = data, out, baseline, teacher, say
        self.options = options
        self.answers: dict[str, list[Answer]] = {}
        self.rows: list[dict[str, Any]] = []
        self.layers: dict[str, dict[str, float]] = {}
        self.gate_points: list[list[float]] = []
        self._questions: QuestionFile | None = None
        self._base_weights: dict[str, torch.Tensor] = {}
        make_folder(out / "answers")

    def add(self, contestant: Contestant) -> Score:
        """Ask one model everything. The baseline comes before those that are compared with it."""
        loaded, codes = open_model(str(contestant.path))
        num_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        self._record_layers(contestant, loaded)  # before the engine takes them
        if self._questions is None:
            self._questions = QuestionFile(self.data, loaded)
        engine = open_engine(loaded, codes, self._questions, self.options)
        entropies: dict[int, float] = {}

        def observe(row: int, first: Choice) -> None:
            assert first.entropy is not None
            entropies[row] = first.entropy

        is_teacher = contestant.name == self.teacher
        answers = answer_all(engine, self._questions, observe=observe if is_teacher else None)
        if is_teacher:
            self.gate_points = gate_points(answers, entropies, engine.weights.head.num_words)
        self.answers[contestant.name] = answers
        write_answers(self.out / "answers" / f"{contestant.name}.jsonl", answers)
        result = score(answers, self._questions.num_total)
        bits = bits_per_weight(Path(loaded.path), num_parameters) if codes else 16.0
        self.rows.append(self._row(contestant, Path(loaded.path), num_parameters, bits, result))
        self.say(f"{contestant.label}: {100 * result.accuracy:.1f} %")
        return result

    def _record_layers(self, contestant: Contestant, loaded: LoadedModel) -> None:
        if contestant.name == self.baseline:
            self._base_weights = {
                name: module.weight.detach().float().clone()
                for name, module in loaded.model.named_modules()
                if isinstance(module, torch.nn.Linear) and ".layers." in name
            }
        elif contestant.name != self.teacher and self._base_weights:
            self.layers[contestant.name] = layer_errors(loaded.model, self._base_weights)

    def _row(
        self, contestant: Contestant, folder: Path, num_parameters: int, bits: float, result: Score
    ) -> dict[str, Any]:
        return {
            "name": contestant.name,
            "label": contestant.label,
            "method": contestant.method,
            "scheme": contestant.scheme,
            "path": os.path.relpath(contestant.path, self.out),
            "num_parameters": num_parameters,
            "num_correct": result.num_correct,
            "num_scored": result.num_scored,
            "accuracy": result.accuracy,
            "low": result.low,
            "high": result.high,
            "bytes": weight_bytes(folder),
            "bits_per_weight": round(bits, 3),
            "kinds": result.kinds,
            "answers": f"answers/{contestant.name}.jsonl",
            "metrics": os.path.relpath(contestant.metrics, self.out) if contestant.metrics else None,
            **self._against_baseline(contestant.name),
        }

    def _against_baseline(self, name: str) -> dict[str, float | None]:
        keys = ("agreement", "difference", "difference_low", "difference_high", "p_value")
        if name == self.baseline or self.baseline not in self.answers:
            return dict.fromkeys(keys)
        own, base = self.answers[name], self.answers[self.baseline]
        mine, theirs = [a.correct for a in own], [a.correct for a in base]
        mean, low, high = paired_difference(mine, theirs)
        values = (agreement(own, base), mean, low, high, mcnemar_p(mine, theirs))
        return dict(zip(keys, values, strict=True))

    def finish(self, title: str, command: str, checks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Write ``results.json``; returns its content."""
        result = {
            "format_version": 1,
            "title": title,
            "created": datetime.date.today().isoformat(),
            "command": command,
            "hardware": hardware(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "data": {
                "path": os.path.relpath(self.data, self.out),
                "root": os.path.relpath(self.data.parent, self.out),
                "num_questions": self._questions.num_total if self._questions else 0,
            },
            "baseline": self.baseline,
            "rows": self.rows,
            "layers": self.layers,
            "gate": {"teacher": self.teacher, "points": self.gate_points},
            "checks": list(checks),
        }
        write_json_atomic(self.out / "results.json", result)
        return result


def gate_points(answers: Sequence[Answer], entropies: Mapping[int, float], num_words: int) -> list[list[float]]:
    """[entropy in nats, gate, 1 if right] of each answer whose first token's entropy is known, by its row."""
    known = [answer for answer in answers if answer.row in entropies]
    entropy = torch.tensor([entropies[answer.row] for answer in known])
    gates = gate_of_entropy(entropy, num_words).tolist()
    return [[entropies[one.row], gate, int(one.correct)] for one, gate in zip(known, gates, strict=True)]


def agreement(a: Sequence[Answer], b: Sequence[Answer]) -> float:
    """Share of questions that two models answer with the same text."""
    return sum(x.answer == y.answer for x, y in zip(a, b, strict=True)) / len(a)


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, lines) of a comparison for a terminal."""
    header = ("model", "accuracy %", "95 % interval", "bytes", "bits/weight", "agrees with base %")
    lines: list[tuple[str, ...]] = [
        (
            str(row["label"]),
            f"{100 * row['accuracy']:.2f}",
            f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.2f}",
            "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f}",
        )
        for row in rows
    ]
    return header, lines
