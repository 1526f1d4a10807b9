"""``grace demo``: the whole method on real pictures, in one folder.

    data/ teacher/ student/ rtn_*/ awq_w4/ gptq_w4/ qat_w4/ grace_w4/ grace_w4_packed/
    training/ answers/ results.json report.html

Each stage publishes its folder whole or not at all; a demo that was interrupted goes on with the first that is
missing, and a complete one prints its table again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table, say
from grace_vlm.errors import CheckpointError, ConfigError, StoppedError

HELP = """Run the whole method on real pictures and questions: train, quantize, pack, prove, compare.

Example: grace demo --out runs/demo"""

NUM_EASY, NUM_SCENES = 400, 2000
"""Held-out questions: of easy-VQA's own, which saturate, and of the harder generated scenes."""
SEED = 1
"""Of the data. The shipped bases were trained on pictures of seed 0: these are new to them."""
PICTURES = {"num_train_images": 100, "num_val_images": 1, "num_test_images": 340}
"""The rows of 2 x 100 training pictures are seen twice in the recipes' 96 steps."""
QAT_RECIPE, GRACE_RECIPE = (Path("recipes") / f"toy_{method}_w4g128.yaml" for method in ("qat", "grace"))
RTN_ROWS = tuple(
    (f"rtn_w{bits}{suffix}", f"w{bits}g128", rule)
    for bits in (4, 3, 2)
    for suffix, rule in (("", "mse"), ("_minmax", "minmax"))
)

CALIBRATED_ROWS: tuple[tuple[str, Literal["awq", "gptq"]], ...] = (("awq_w4", "awq"), ("gptq_w4", "gptq"))


def demo(
    out: Path = typer.Option(Path("runs/demo"), "--out", help="Folder of the demo."),
    teacher: str = typer.Option("assets/toy-teacher", "--teacher", help="Teacher: model or run folder."),
    student: str = typer.Option("assets/toy-student", "--student", help="Base student: model or run folder."),
    steps: int = typer.Option(None, "--steps", min=2, help="Optimizer steps of QAT and GRACE; default: the recipes'."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.evals.compare import table

    for recipe in (QAT_RECIPE, GRACE_RECIPE):
        if not recipe.is_file():
            raise ConfigError(f"{recipe} does not exist; run grace demo in a clone of the repository")
    inputs = {"teacher": _identity(teacher), "student": _identity(student), "steps": steps}
    _require_same_inputs(out, inputs, (teacher, student))
    result_path, page = out / "results.json", out / "report.html"
    if not (result_path.is_file() and page.is_file()):
        _Demo(out, teacher, student, steps).run()
    result = json.loads(result_path.read_text(encoding="utf-8"))
    if as_json:
        emit_json({"page": str(page), **result})
    else:
        print_table(*table(result["rows"]))
        for check in result["checks"]:
            print(f"{'ok  ' if check['passed'] else 'FAIL'} {check['name']}: {check['value']}")
        print(f"page: {page}")
    raise typer.Exit(0 if all(check["passed"] for check in result["checks"]) else 1)


def _identity(source: str) -> str:
    """A base by its name and, if it is a sealed folder, the hash of its manifest."""
    from grace_vlm.checkpoint.manifest import MARKER

    marker = Path(source) / MARKER
    return f"{source} {marker.read_text(encoding='utf-8')[:16]}" if marker.is_file() else source


def _require_same_inputs(out: Path, inputs: dict[str, Any], sources: Sequence[str]) -> None:
    """A demo folder is of one pair of bases and one number of steps: they are noted at its start and compared later."""
    from grace_vlm.checkpoint.atomic import write_json_atomic
    from grace_vlm.models.load import resolve_source

    note = out / "inputs.json"
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        changed = [
            f"{name} was {before.get(name)}, now {value}" for name, value in inputs.items() if before.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                f"{out} is a demo of other inputs ({'; '.join(changed)}); choose another --out or remove it"
            )
    else:
        for source in sources:
            resolve_source(source)  # one that is not there is said before anything is made
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(note, inputs)


@dataclass(frozen=True)
class _Demo:
    """One demo folder and how to fill it."""

    out: Path
    teacher: str
    student: str
    steps: int | None

    def run(self) -> None:
        """Every stage that is missing, then the comparison."""
        from grace_vlm.checkpoint.atomic import sweep_partials
        from grace_vlm.checkpoint.lock import FolderLock
        from grace_vlm.evals.report import render_report
        from grace_vlm.formats.pack import pack

        with FolderLock(self.out):
            sweep_partials(self.out)
            self._stage("data", self._prepare_data)
            self._stage("data/questions.jsonl", self._choose_questions)
            self._stage("teacher", partial(copy_model, self.teacher))
            self._stage("student", partial(copy_model, self.student))
            for name, scheme, rule in RTN_ROWS:
                self._stage(name, partial(self._round, scheme, rule))
            for name, method in CALIBRATED_ROWS:
                self._stage(name, partial(self._calibrate, method))
            self._stage("qat_w4", partial(self._train, "qat_w4", QAT_RECIPE))
            self._stage("grace_w4", partial(self._train, "grace_w4", GRACE_RECIPE))
            self._stage("grace_w4_packed", lambda dst: pack(self.out / "grace_w4", dst, "compressed-tensors"))
            self._compare()
            render_report(self.out)

    def _stage(self, name: str, make: Callable[[Path], Any]) -> None:
        target = self.out / name
        if target.exists():
            return
        say(f"making {name}")
        make(target)

    def _round(self, scheme: str, rule: str, dst: Path) -> None:
        from grace_vlm.ptq.quantize import quantize_folder

        quantize_folder(str(self.out / "student"), dst, scheme, scale="mse" if rule == "mse" else "minmax")

    def _calibrate(self, method: Literal["awq", "gptq"], dst: Path) -> None:
        from grace_vlm.ptq.calibration import Calibration
        from grace_vlm.ptq.quantize import quantize_folder

        rows = Calibration(self.out / "data" / "train_questions.jsonl")
        quantize_folder(str(self.out / "student"), dst, "w4g128", method=method, calibration=rows)

    def _prepare_data(self, dst: Path) -> None:
        """A part of the toy source."""
        from grace_vlm.data.sources.prepare import prepare

        prepare("toy", dst, seed=SEED, overwrite=False, **PICTURES)

    def _choose_questions(self, dst: Path) -> None:
        from grace_vlm.checkpoint.atomic import write_bytes_atomic
        from grace_vlm.data.sources.choose import choose_questions

        write_bytes_atomic(dst, choose_questions(dst.parent / "test.jsonl", NUM_EASY, NUM_SCENES))

    def _train(self, name: str, recipe_path: Path, dst: Path) -> None:
        from grace_vlm.train.config import load_recipe
        from grace_vlm.train.loop import train

        overrides = [
            f"data.train={self.out / 'data' / 'train_questions.jsonl'}",
            f"model.student={self.out / 'student'}",
        ]
        if recipe_path == GRACE_RECIPE:
            overrides.append(f"model.teacher={self.out / 'teacher'}")
        if self.steps is not None:
            overrides.append(f"optim.num_steps={self.steps}")
        recipe = load_recipe(recipe_path, overrides)
        run = self.out / "training" / name
        with ProgressBar(name) as bar:

            def tell(report: Any, num_steps: int) -> None:
                bar.update(report.step + 1, num_steps, f"loss {report.loss:.3f}")

            try:
                final = train(recipe, run, resume=run.exists(), notify=say, progress=tell)
            except StoppedError as stopped:
                said = f"stopped, with a checkpoint of {name}; the same command goes on"
                raise StoppedError(said, stopped.number) from None
        copy_model(str(final), dst)

    def _compare(self) -> None:
        from grace_vlm.evals.compare import Comparison, Contestant

        out = self.out
        comparison = Comparison(out / "data" / "questions.jsonl", out, "student", "teacher", say)
        trained = {name: out / "training" / name / "metrics.jsonl" for name in ("qat_w4", "grace_w4")}
        for contestant in (
            Contestant("student", "student BF16", out / "student", "sft", "bf16"),
            Contestant("teacher", "teacher BF16", out / "teacher", "sft", "bf16"),
            *[Contestant(name, f"RTN {scheme} ({rule})", out / name, "rtn", scheme) for name, scheme, rule in RTN_ROWS],
            *[
                Contestant(name, f"{method.upper()} w4g128 (mse)", out / name, method, "w4g128")
                for name, method in CALIBRATED_ROWS
            ],
            Contestant("qat_w4", "QAT W4, no teacher", out / "qat_w4", "qat", "w4g128", trained["qat_w4"]),
            Contestant("grace_w4", "GRACE W4", out / "grace_w4", "grace", "w4g128", trained["grace_w4"]),
            Contestant("grace_w4_packed", "GRACE W4 packed", out / "grace_w4_packed", "grace", "w4g128"),
        ):
            comparison.add(contestant)
        comparison.rows.sort(key=lambda row: row["name"] != "teacher")
        comparison.finish("GRACE on real pictures", "make demo", self._checks(comparison.answers))

    def _checks(self, answers: dict[str, Any]) -> list[dict[str, Any]]:
        """What makes the demo no empty show."""
        from grace_vlm.evals.compare import agreement
        from grace_vlm.formats.verify import verify
        from grace_vlm.train.config import load_recipe
        from grace_vlm.train.record import read_metrics

        run = self.out / "training" / "grace_w4"
        bounds = load_recipe(run / "config.yaml").loss.adaptive_weight
        proof = verify(self.out / "grace_w4", self.out / "grace_w4_packed")
        same = agreement(answers["grace_w4"], answers["grace_w4_packed"])
        return [
            *training_checks(read_metrics(run / "metrics.jsonl"), bounds.minimum, bounds.maximum),
            _check("packed equals trained, value for value", "yes" if proof.equal else str(proof.first), proof.equal),
            _check("packed answers as trained", f"{100 * same:.2f} % of the questions", same == 1.0),
        ]


def _check(name: str, value: str, passed: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "passed": passed}


def training_checks(lines: list[dict[str, Any]], minimum: float, maximum: float) -> list[dict[str, Any]]:
    """That a GRACE run's parts all did something, from its ``metrics.jsonl`` and the bounds of its adaptive weight."""
    images, entered = sum(x["images"] for x in lines), sum(x["images_in_relation"] for x in lines)
    weights = [x["weight"] for x in lines]
    inside = min(weights) > minimum and max(weights) < maximum and len(set(weights)) > 1
    flipped = sum(x["codes_flipped"] for x in lines)
    checks = [
        _check("images in the relation loss", f"{entered} of {images}", images > 0 and entered >= 0.9 * images),
        _check("adaptive weight inside its bounds, moving", f"{weights[0]:.3f} to {weights[-1]:.3f}", inside),
        _check("codes flipped", f"{flipped:,}", flipped > 0),
        _check("mean scale drift", f"{lines[-1]['scale_drift']:.4f}", lines[-1]["scale_drift"] > 0),
    ]
    # Halves: with the recipe's steps each is one pass over the rows, so the same rows are compared.
    half = max(1, len(lines) // 2)
    for term in ("cross_entropy", "distillation", "relational"):
        first = sum(x[term] for x in lines[:half]) / half
        last = sum(x[term] for x in lines[-half:]) / half
        checks.append(_check(f"{term} falls", f"{first:.4f} to {last:.4f}", last < first))
    return checks


def copy_model(source: str, dst: Path) -> None:
    """Publish a copy of a model folder (its manifest is checked first, its copy gets its own)."""
    from grace_vlm.checkpoint.atomic import publish_folder
    from grace_vlm.checkpoint.manifest import is_complete, verify_manifest
    from grace_vlm.models.load import resolve_source

    try:
        folder = Path(resolve_source(source))
    except ConfigError as error:
        hint = "run grace demo in a clone of the repository, or pass --teacher and --student"
        raise ConfigError(f"{error}; {hint}") from None
    if is_complete(folder):
        verify_manifest(folder)
    with publish_folder(dst) as stage:
        seals = shutil.ignore_patterns("manifest.json", "manifest.sha256", ".lock")
        shutil.copytree(folder, stage, dirs_exist_ok=True, ignore=seals)
