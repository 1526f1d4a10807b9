"""The comparison on pretrained weights, on toy models: what rows hold, that a stopped one goes on, what is reported."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_run import COLOURS, write_rows

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report_smollm2 as report  # noqa: E402
import smollm2 as bench  # noqa: E402
import smollm2_again as again  # noqa: E402
import smollm2_jobs as jobs_of  # noqa: E402
import smollm2_rows as rows_of  # noqa: E402
import smollm2_runtimes as runtimes  # noqa: E402
import smollm2_table as table_of  # noqa: E402
import smollm2_why as why  # noqa: E402
from smollm2_measure import Exam, Examination  # noqa: E402

from grace_vlm.data.check import check_file  # noqa: E402
from grace_vlm.errors import StoppedError  # noqa: E402
from grace_vlm.evals.run import QuestionFile, answer_all, open_engine  # noqa: E402
from grace_vlm.evals.toy.suite import write_toy_suite  # noqa: E402
from grace_vlm.formats.publish import publish_model  # noqa: E402
from grace_vlm.models.load import load_model  # noqa: E402
from grace_vlm.models.toy import build_toy_model, build_toy_processor  # noqa: E402
from grace_vlm.train.config import load_recipe  # noqa: E402

IMAGES = ROOT / "docs" / "images"
STUDENT, TEACHER = ROOT / "assets" / "toy-student", ROOT / "assets" / "toy-teacher"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exam, list[str]]:
    folder = tmp_path_factory.mktemp("world")
    rows = write_rows(folder / "rows", num_rows=24)
    text = folder / "prose.txt"
    text.write_text(" ".join(f"What is {n} of {n * n}? Count the red circles." for n in range(150)))
    write_toy_suite(folder / "suite", 0)
    exam = Exam(folder / "suite", rows, {"prose": text}, window=128, limit=3)
    changes = {
        "model.student": STUDENT,
        "model.teacher": TEACHER,
        "data.train": rows,
        "data.root": "null",
        "data.workers": 0,
        "data.micro_batch_size": 2,
        "optim.num_steps": 2,
        "runtime.device": "cpu",
    }
    return exam, [f"{key}={value}" for key, value in changes.items()]


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs in a new folder, with the recipes of this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs_of, "RECIPES", ROOT / "recipes" / "smollm2")


def test_rows_of_every_kind_and_a_second_call_makes_none_again(
    world: tuple[Exam, list[str]], tmp_path: Path, in_a_folder: None
) -> None:
    exam, overrides = world
    path = tmp_path / "headline.jsonl"
    table = bench.Table(path, overrides, exam)
    jobs = [jobs_of.Job("student", "bf16"), jobs_of.Job("gptq"), jobs_of.Job("grace", seed=1, rate=1e-4)]
    assert not table.make(jobs, bench.Clock(0))
    assert rows_of.read_rows(path) == []
    assert table.make(jobs, bench.Clock(None))
    student, gptq, grace = rows_of.read_rows(path)
    for row in (student, gptq, grace):
        assert set(row["suite"]) == {"hallusion", "mmbench", "scienceqa", "ai2d", "mmmu", "seed", "mmstar"}
        assert len(row["questions"]["correct"]) == 3
        assert len(row["texts"]["prose"]["losses"]) == 3
    assert student["texts"]["prose"]["agreement"] == 1.0
    assert gptq["texts"]["prose"]["divergences"][0] > 0
    assert (student["steps"], grace["steps"]) == (0, 2)
    assert grace["last"]["distillation"] > 0
    assert (student["weights"], gptq["weights"], len(grace["weights"])) == (None, None, 32)
    again = table.row(jobs[-1])
    assert again["weights"] == grace["weights"], "the same bits"
    assert [one["compiled"] for one in (student, gptq, grace, again)] == [False, False, True, False]
    assert table.row(replace(jobs[-1], seed=2))["weights"] != grace["weights"]
    # Right or wrong is what grace eval says of the same rows.
    loaded = load_model(str(STUDENT), "cpu")
    assert exam.questions is not None
    questions = QuestionFile(exam.questions, loaded, limit=3)
    answers = answer_all(open_engine(loaded, {}, questions), questions)
    assert student["questions"]["correct"] == "".join("01"[answer.correct] for answer in answers)
    before = path.read_bytes()
    assert table.make(jobs, bench.Clock(None))
    assert path.read_bytes() == before
    assert not list((tmp_path / "runs" / "smollm2" / "rows").iterdir())


def test_a_search_asks_the_validation_half_alone(world: tuple[Exam, list[str]]) -> None:
    """Where it was not asked stands no answer, and every other one is that of the whole."""
    exam, _ = world
    halves: list[dict[str, Any]] = []
    for is_asked in (None, lambda number: number % 2 == 0):
        loaded = load_model(str(STUDENT), "cpu")
        own = replace(exam, suite=None, texts={}, is_asked=is_asked)
        halves.append(Examination(own, loaded).of(loaded))
    whole, asked = halves[0]["questions"], halves[1]
    assert asked["suite"] == asked["texts"] == {}
    marks = asked["questions"]["correct"]
    assert marks == "".join("-" if number % 2 else bit for number, bit in enumerate(whole["correct"]))
    assert sum(total for _, total in asked["questions"]["kinds"].values()) == 2
    assert rows_of.right_of(asked) == marks.count("1") / 2


def test_a_variant_of_two_stages_starts_from_its_first(
    world: tuple[Exam, list[str]], tmp_path: Path, in_a_folder: None
) -> None:
    exam, overrides = world
    table = bench.Table(tmp_path / "v.jsonl", overrides, Exam(None, None, exam.texts, 128, 1))
    job = jobs_of.Job("from_w8", seed=0, rate=1e-4)
    table._before(job)
    folder = tmp_path / jobs_of.first_stage(job)
    first = load_model(str(folder), "cpu")
    grid = Path(first.path) / "grid" / "plan.json"
    assert "w8g64" in grid.read_text()
    assert table.make([job], bench.Clock(None))
    assert not folder.exists(), "what a row went on from goes with it"
    (row,) = rows_of.read_rows(tmp_path / "v.jsonl")
    assert row["scheme"] == "w4g64"
    assert row["suite"] == {}


def test_a_variant_goes_on_from_a_quantized_student(
    world: tuple[Exam, list[str]], tmp_path: Path, in_a_folder: None
) -> None:
    exam, overrides = world
    # Of SmolLM2's class: files name its modules otherwise than the model does.
    processor = build_toy_processor(["what color is it?", *COLOURS] * 3, 320, size="llava")
    for name in ("student", "teacher"):
        publish_model(tmp_path / name, build_toy_model("llava", processor), processor, {}, (), "# toy\n")
    overrides = [*overrides, f"model.student={tmp_path / 'student'}", f"model.teacher={tmp_path / 'teacher'}"]
    table = bench.Table(tmp_path / "v.jsonl", overrides, Exam(None, None, exam.texts, 128, 1), 4)
    jobs = [jobs_of.Job(name, seed=0, rate=1e-4) for name in jobs_of.QUANTIZED_FIRST]
    assert table.make(jobs, bench.Clock(None))
    rows = rows_of.read_rows(tmp_path / "v.jsonl")
    assert [row["steps"] for row in rows] == [2] * 4
    assert len({row["texts"]["prose"]["losses"][0] for row in rows}) == 4
    assert not list((tmp_path / "runs" / "smollm2" / "first").iterdir())


def test_a_variant_reads_half_as_many_rows_twice(
    world: tuple[Exam, list[str]], tmp_path: Path, in_a_folder: None
) -> None:
    exam, overrides = world
    table = bench.Table(tmp_path / "v.jsonl", overrides, Exam(None, None, exam.texts, 128, 1))
    job = jobs_of.Job("seen_twice", seed=3, rate=1e-4)
    folder = table._before(job)
    assert folder is not None
    assert exam.questions is not None
    seen = (folder / jobs_of.SEEN_FILE).read_text().splitlines()
    assert len(set(seen)) == 4, "two steps of two rows"
    assert set(seen) < set(exam.questions.read_text().splitlines())
    assert table.make([job], bench.Clock(None))
    (made,) = rows_of.read_rows(tmp_path / "v.jsonl")
    assert made["steps"] == 4
    assert not folder.exists()


def test_a_step_of_several_micro_batches_has_the_rows_of_one(in_a_folder: None) -> None:
    for size, parts in ((64, [16, 4]), (4, [1, 4]), (2, [1, 2]), (1, [1, 1])):
        stated = [f"data.micro_batch_size={size}"]
        data = jobs_of.recipe_of(jobs_of.Job("microbatch", seed=0, rate=1e-4), stated).data
        assert [data.micro_batch_size, data.accumulation] == parts


def test_every_row_is_a_recipe() -> None:
    """Names, overrides and rates make valid recipes that differ from the base where they say."""
    rates = dict.fromkeys(jobs_of.SEARCHED, 1e-4)
    cwd = jobs_of.RECIPES
    jobs_of.RECIPES = ROOT / "recipes" / "smollm2"
    try:
        for jobs in (jobs_of.search_jobs(), *(make(rates) for make in jobs_of.JOBS.values()), jobs_of.small_jobs()):
            keys = [job.key for job in jobs]
            assert len(set(keys)) == len(keys)
            for job in jobs:
                if job.name in (*jobs_of.METHODS, *jobs_of.VARIANTS):
                    recipe = jobs_of.recipe_of(job, ())
                    assert recipe.runtime.seed == job.seed
                    assert recipe.optim.learning_rate == job.rate
        base = jobs_of.recipe_of(jobs_of.Job("grace", seed=0, rate=1e-4), ())
        for name in (*jobs_of.METHODS, *jobs_of.VARIANTS):
            other = jobs_of.recipe_of(jobs_of.Job(name, seed=0, rate=1e-4), ())
            assert (other == base) == (name == "grace"), name
    finally:
        jobs_of.RECIPES = cwd


def row(name: str, seed: int | None, right: int, loss: float, student: str = "s") -> dict[str, Any]:
    scheme = "bf16" if name in ("student", "teacher", "sft") else "w4g64"
    bits = "1" * 100 + "1" * right + "0" * (100 - right)
    return {
        "name": name, "scheme": scheme, "seed": seed, "rate": None, "student": student, "steps": 0,
        "made_seconds": 30.0, "seconds": 60.0, "first": {}, "last": {},
        "suite": {"seed": {"metric": "accuracy", "value": right / 100, "unparsed": 0, "scores": []}},
        "questions": {"correct": bits, "kinds": {}},
        "texts": {"prose": {"losses": [loss, loss], "divergences": [0.1, 0.1], "agreement": 0.9, "num_tokens": 9}},
        "device": "cpu", "torch": "2", "transformers": "5", "commit": "c",
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    for one in rows:
        rows_of.append_row(path, one)


def test_the_time_of_rows_beside_others_says_nothing(tmp_path: Path) -> None:
    rows = [row("student", None, 80, 2.0), {**row("qat", 0, 70, 2.2), "made_seconds": 120.0}]
    rows += [{**row("qat", 1, 70, 2.2), "beside": 2}, {**row("kd", 0, 70, 2.2), "beside": 2}]
    write(tmp_path / "headline.jsonl", rows)
    text = "\n".join(report.pages(tmp_path, tmp_path))
    assert (
        "4 rows, 3 minutes in all (those of rows that shared a GPU divided by their number), for" in text
    )  # 2 + 2 / 3
    table = text[text.index("least seconds") :].split("\n\n")[0]
    ends = {line.split(" | ")[0]: line.split(" | ")[-1] for line in table.splitlines()}
    assert ends["| QAT"] == "120 |"
    assert ends["| QAT with plain distillation"] == " |"
    costs = [{**row(name, seed, 0, 0.0), "made_seconds": 20.0 + seed} for name in ("qat", "kd") for seed in (1, 0)]
    for one in (costs[0], costs[2]):  # the first of two processes: they wait for what is compiled, and are no measure
        one |= {"made_seconds": 5.0, "compiled": True}
    write(tmp_path / "costs.jsonl", [{**one, "suite": {}, "questions": {}, "texts": {}} for one in costs])
    table = "\n".join(report.pages(tmp_path, tmp_path)).partition("least seconds")[2].split("\n\n")[0]
    ends = {line.split(" | ")[0]: line.split(" | ")[-1] for line in table.splitlines()}
    assert (ends["| QAT"], ends["| QAT with plain distillation"]) == ("20 |", "20 |")
    assert ends["| student, BF16"] == " |", "costs of its own, which nobody measured"
    write(tmp_path / "costs.jsonl", [row("qat", 2, 0, 0.0, "another")])
    assert "| 120 |" in "\n".join(report.pages(tmp_path, tmp_path)), "costs of another student say nothing of this one"


@pytest.mark.parametrize(("lost", "said"), [(2.01, ""), (2.4, "75 %")])
def test_of_a_loss_that_is_none_nothing_is_given_back(lost: float, said: str) -> None:
    found = [row("student", None, 80, 2.0), row("rtn_minmax", None, 80, lost), row("qat", 0, 80, 2.1)]
    runs = {(one["name"], one["scheme"]): {one["seed"]: one} for one in found}
    assert report.recovered(runs, "qat", "w4g64", report.text_loss) == said


def test_models_that_were_not_trained_differ_by_what_they_were_asked(tmp_path: Path) -> None:
    rows = [row("student", None, 80, 2.0), row("rtn_minmax", None, 60, 3.0), row("gptq", None, 70, 2.5)]
    for one, losses, right in zip(rows, ([2.0] * 3, [3.0] * 3, [2.2, 2.5, 2.8]), (30, 10, 25), strict=True):
        one["texts"]["prose"]["losses"] = losses
        one["questions"]["correct"] += "-" * 100 + "1" * right + "0" * (50 - right)  # a block that is half as long
    write(tmp_path / "headline.jsonl", rows)
    text = "\n".join(report.pages(tmp_path, tmp_path))
    # Of 150 questions 110, 70 and 95 are right: 25 of 40. By blocks: gaps of 20 and 20, gains of 10 and 15, their
    # departures from 5 / 8 are -2.5 and 2.5: t(1) = 12.706 times 0.125 (100 %).
    # Shares of 80, 50 and 20 % of three windows: 4.303 * 30 / sqrt(3).
    assert " | 62 % [-96, 221] | 50 % [-25, 125] | " in next(line for line in text.splitlines() if "| GPTQ |" in line)
    (line,) = [own for own in text.splitlines() if own.startswith("| GPTQ - RTN, min-max scales | log")]
    # t(2) sd / sqrt(3) = 4.303 * 0.3 / 1.732; t = 2.887. Three of them are tested, the third has p = 1.
    assert line == "| GPTQ - RTN, min-max scales | log perplexity | -0.500 [-1.245, +0.245] | 0.1 | 0.31 |  |"
    (line,) = [own for own in text.splitlines() if own.startswith("| GPTQ - RTN, min-max scales | questions")]
    # 10 and 15 of 75 questions a block: 13.3 and 20, t = 16.667 / 3.333.
    assert line == "| GPTQ - RTN, min-max scales | questions % | +16.667 [-25.687, +59.021] | 0.13 | 0.31 |  |"


def test_rows_that_were_asked_different_numbers_of_questions_are_refused(tmp_path: Path) -> None:
    rows = [row("student", None, 80, 2.0), row("rtn_minmax", None, 60, 3.0), row("gptq", None, 70, 2.5)]
    rows[2]["texts"]["prose"]["losses"] = [2.5]
    write(tmp_path / "headline.jsonl", rows)
    with pytest.raises(SystemExit, match=r"\(student 2, rtn_minmax 2, gptq 1\); make them with the same --limit"):
        report.pages(tmp_path, tmp_path)


def test_what_it_took_in_all(tmp_path: Path, in_a_folder: None) -> None:
    for name in ("teacher", "student"):
        shutil.copytree(STUDENT, jobs_of.RUNS / name / "final")
        (jobs_of.RUNS / name / "seconds.txt").write_text("90.0\n")
        bench.note_stage(name, tmp_path / "stages.json")
    digest = table_of.digest_of(str(jobs_of.RUNS / "student"))
    first = rows_of.read_stages(tmp_path / "stages.json")
    assert first["student"]["weights"] == digest
    (jobs_of.RUNS / "student" / "seconds.txt").write_text("99.0\n")  # asked once more, it was complete
    bench.note_stage("student", tmp_path / "stages.json")
    assert rows_of.read_stages(tmp_path / "stages.json") == first
    searched = [row("qat", 100, 70, 2.2, digest), row("qat", 100, 70, 2.2)]
    write(tmp_path / "search.jsonl", [{**one, "rate": 1e-4} for one in searched])
    write(tmp_path / "headline.jsonl", [row(name, None, 80, 2.0, digest) for name in ("student", "rtn_minmax")])
    said = "GPU minutes: `teacher` 1.5, `student` 1.5, search (1 rows) 1.0, headline (2 rows) 2.0; 6 in all."
    assert said in report.pages(tmp_path, tmp_path)
    assert report.cost_line(tmp_path, "s") == []
    took = {"command": "headline", "student": digest, "rows": 2, "seconds": 45.0, "gpus": 2}
    write(tmp_path / "minutes.jsonl", [took, {**took, "seconds": 15.0}, {**took, "student": "s"}])
    said = "GPU minutes: `teacher` 1.5, `student` 1.5, search (1 rows) 1.0, headline (2 rows) 2.0; 6 in all."
    assert said in report.pages(tmp_path, tmp_path), "sixty seconds of two GPUs, by the clock"


def test_the_report_says_what_rows_say(tmp_path: Path) -> None:
    rows = [
        row("student", None, 80, 2.0),
        row("rtn_minmax", None, 60, 2.5),
        row("gptq", None, 70, 2.25),
        *(row("qat", seed, 70 + seed, 2.2) for seed in range(3)),
        *(row("grace", seed, 72 + 2 * seed, 2.1) for seed in range(3)),
    ]
    write(tmp_path / "headline.jsonl", [row("grace", 7, 0, 9.0, "another student"), *rows])
    text = "\n".join(report.pages(tmp_path, tmp_path))
    assert "9 rows, 9 minutes in all, for the student `s`" in text
    assert "| GPTQ |  | 70.00 | 70.00 | 9.49 | 0.100 | 90.0 | 50 % | 50 % [50, 50] | 30 |" in text
    # (72, 74, 76 - 60) / 20, mean 70 %, t(2) sd/sqrt(3) = 4.303 * 10 / 1.732
    assert (
        "| GRACE | 3 | 74.00 ± 2.00 | 74.00 ± 2.00 | 8.17 ± 0.00 | 0.100 ± 0.000 | 90.0 ± 0.0 | 70 % [45, 95]" in text
    )
    # Differences 2, 3, 4: mean 3, standard error 0.577, t = 5.196.
    (line,) = [own for own in text.splitlines() if own.startswith("| GRACE - QAT | questions %")]
    assert "| +3.000 [+0.516, +5.484] | 0.035 |" in line
    assert line.endswith("| +2.00, +3.00, +4.00 |")
    (line,) = [own for own in text.splitlines() if own.startswith("| GRACE - student, BF16 | log perplexity")]
    assert "| +0.100" in line
    assert "another" not in text


def test_sentences_are_of_the_rows(tmp_path: Path) -> None:
    """Orders, shares, gaps and their p values; what nobody made is not spoken of."""
    rows = [row("student", None, 80, 2.0), row("teacher", None, 90, 1.0), row("rtn_minmax", None, 60, 2.5)]
    for name, right in (("qat", 70), ("kd", 76), ("grace", 72)):
        rows += [{**row(name, seed, right + seed, 2.2), "last": {"cross_entropy": 0.5}} for seed in range(3)]
    for one in rows:
        if one["name"] == "grace":
            one["last"] |= {"distillation": 9.0, "weight": 1.0}
    write(tmp_path / "headline.jsonl", rows)
    write(
        tmp_path / "variants.jsonl",
        [{**row("relation_early", seed, right, 2.2), "rate": 5e-5} for seed, right in enumerate((74, 74, 75))],
    )
    rates = [{**row("qat", 100, 0, 2.0), "rate": rate} for rate in (1e-4, 2e-4)]
    for one, right in zip(rates, (60, 62), strict=True):
        one["questions"]["correct"] = "1" * right + "0" * (100 - right)
    write(tmp_path / "search.jsonl", rates)
    write(
        tmp_path / "other_rates.jsonl",
        [{**row(name, 1, 60 + len(name), 2.2), "rate": 9e-4} for name in ("qat", "grace")],
    )
    text = "\n".join(report.pages(tmp_path, tmp_path)).partition("### Four bits")[0]
    # exp(0.5) - 1; 20 of 100 points, of which 11, 17 and 13 come back in the mean.
    assert "costs 65 % of perplexity (7.4 to 12.2) and 20.0 points of the questions (80.0 to 60.0 % of 200 that" in text
    assert "best first: plain distillation 85 % [73, 97], GRACE 65 % [53, 77], QAT 55 % [43, 67]. Of what was" in text
    assert "trained the order is plain distillation, GRACE and QAT: GRACE - QAT +2.0, GRACE" in text, "a gap without p"
    assert "QAT 0.0002 (by 2.00 points)" in text
    assert "term is 9.0 " in text
    assert "GRACE at 0.0009 beside QAT at 0.0009: +2.0 points over the seeds 1; at the searched rates these" in text
    # 74 - 72, 74 - 73 and 75 - 74: mean 1.33, standard error 1 / 3, t = 4.
    assert "- **`relation_early` - GRACE** (3 seeds, rate 5e-05): questions +1.3 (p 0.057, Holm" in text
    assert "three bits" not in text
    assert "What a method takes" not in text


def test_why_is_made_of_a_run_that_is_kept(world: tuple[Exam, list[str]], tmp_path: Path, in_a_folder: None) -> None:
    exam, overrides = world
    digest = table_of.digest_of(str(STUDENT))
    rows = [{**row(job.name, job.seed, 40, 1.0, digest), "rate": job.rate} for job in jobs_of.search_jobs()]
    write(tmp_path / "search.jsonl", rows)
    why.main([*overrides, f"--data={exam.questions}", "--limit=6", "--device=cpu", f"--out={tmp_path}"])
    assert (tmp_path / "runs" / "smollm2" / "grace" / "final" / "grid").is_dir(), "its weights are kept"
    write(tmp_path / "headline.jsonl", [row("student", None, 80, 2.0, digest)])
    text = "\n".join(report.pages(tmp_path, tmp_path))
    assert "| GRACE, W4G64, 6 held-out questions | |" in text
    assert "| mlp.down_proj alone, sum of layers |" in text
    assert len(list(tmp_path.glob("smollm2_*.svg"))) == text.count("](images/smollm2_") == len(report.WHY) - 1
    write(tmp_path / "headline.jsonl", [row("student", None, 80, 2.0, "another student")])
    assert "Why" not in "\n".join(report.pages(tmp_path, tmp_path)), "it is not of that student"
    first, stated = (tmp_path / "why.json").read_text(), [*overrides, f"--data={exam.questions}", "--limit=6", "--kept"]
    before = (why.KEPT / "final" / "manifest.json").stat().st_mtime_ns
    why.main([*stated, "--device=cpu", f"--out={tmp_path}"])
    assert (why.KEPT / "final" / "manifest.json").stat().st_mtime_ns == before, "it is looked at and not made again"
    own, again = json.loads(first), json.loads((tmp_path / "why.json").read_text())
    assert own["grace"]["codes"] == again["grace"]["codes"]
    why.KEPT_OF.write_text("another student")
    with pytest.raises(SystemExit):
        why.main([*stated, "--device=cpu", f"--out={tmp_path}"])


def test_rows_without_training_wait_for_no_search(tmp_path: Path) -> None:
    args = argparse.Namespace(command="headline", only=["rtn", "teacher"], language=False, rates=None)
    assert [(job.name, job.rate) for job in bench.jobs_of(args, tmp_path, "s")] == [("teacher", None), ("rtn", None)]
    args.only.append("qat")
    with pytest.raises(SystemExit, match="12 rows of the search are missing"):
        bench.jobs_of(args, tmp_path, "s")
    rates = [{**row(job.name, job.seed, 40, 1.0, "another"), "rate": job.rate} for job in jobs_of.search_jobs()]
    write(tmp_path / "rates.jsonl", rates)
    args.rates = tmp_path / "rates.jsonl"
    assert [job.rate for job in bench.jobs_of(args, tmp_path, "s") if job.name == "qat"] == [2e-5] * 5
    args.only.append("rtl")
    with pytest.raises(ValueError, match="headline has no row rtl; it has awq, block, gptq, grace"):
        bench.jobs_of(args, tmp_path, "s")


def test_costs_are_of_what_the_headline_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rates = dict.fromkeys(jobs_of.SEARCHED, 1e-4)
    costs = jobs_of.cost_jobs(rates)
    assert {job.key for job in costs} < {job.key for job in jobs_of.headline_jobs(rates)}
    assert [job.seed for job in costs if job.name == "grace"] == [0, 1]
    args = argparse.Namespace(command="costs", only=["rtn"], language=False, rates=None)
    assert bench.jobs_of(args, tmp_path, "s") == [jobs_of.Job("rtn")]
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "costs", "--language"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "costs are of a GPU; rows of --language were made alone" in capsys.readouterr().err


def test_the_headline_made_again_stands_beside_the_first(tmp_path: Path) -> None:
    untrained = [row(name, None, right, loss) for name, right, loss in (("student", 80, 2.0), ("rtn", 60, 2.5))]
    untrained.append(row("rtn_minmax", None, 50, 3.0))
    seeds = [row(name, seed, 70 + seed, 2.2) for name in ("qat", "kd") for seed in range(3)]
    write(tmp_path / "headline.jsonl", [*untrained, *seeds])
    assert "again" not in "\n".join(report.pages(tmp_path, tmp_path))
    new = [row("qat", seed, right, 2.2) for seed, right in enumerate((74, 75, 76))]
    write(tmp_path / "again" / "headline.jsonl", [untrained[0], row("rtn", None, 60, 2.6), untrained[2], *new])
    made = {"weights": "0123456789", "seconds": 90.0, "device": "cpu", "commit": "c"}
    (tmp_path / "again" / "stages.json").write_text(json.dumps({"teacher": made}))
    lines = report.pages(tmp_path, tmp_path)
    own = [line for line in lines[lines.index(next(one for one in lines if "made again" in one)) :] if line]
    assert "- Stages at commit c: `teacher` 01234567, 1.5 GPU minutes." in own
    assert "| student, BF16 | 80.00 | the same |  |  | 7.39 | the same |  |" in own
    assert "| RTN, MSE scales | 60.00 | 60.00 | 33 % |  | 12.18 | 13.46 | 40 % [40, 40] |" in own
    # 70, 71 and 72: 71 and t(2) sd / sqrt(3) = 4.303 * 1 / 1.732; 75 of (80 - 50). t(4) = 4 / sqrt(2 / 3) = 4.899.
    (line,) = [one for one in own if one.startswith("| QAT |")]
    assert line.startswith(
        "| QAT | 71.00 [68.52, 73.48] | 75.00 [72.52, 77.48] | 83 % [75, 92] | 0.008, 0.008 | 9.03 ["
    )
    assert line.endswith(" | 80 % [80, 80] |"), "losses without spread are not tested, and have no column"
    assert not any(one.startswith("| QAT with") for one in own), "nobody made it again"
    earlier = tmp_path / report.EARLIER
    write(earlier / "headline.jsonl", [row("student", None, 90, 1.0, "another"), row("qat", 0, 70, 2.2, "another")])
    write(earlier / "again" / "headline.jsonl", [row("qat", 0, 70, 2.2, "another")])
    searched = [{**row("qat", 100, 70 + number, 2.2), "rate": rate} for number, rate in enumerate((1e-4, 2e-4, 5e-4))]
    write(tmp_path / "search.jsonl", searched)
    write(
        tmp_path / "again" / "search.jsonl",
        [searched[0], {**searched[1], "rate": 5e-4}, {**row("qat", 100, 0, 0, "other"), "rate": 2e-4}],
    )
    text = "\n".join(report.pages(tmp_path, tmp_path))
    assert "- Of 3 rows of the search 2 were made again: 1 are the same." in text, "the last has other answers"
    own = text[text.index("### An earlier pair: four bits, groups of 64") :]
    assert "| student, BF16 |  | 90.00 | 90.00 | 2.72 | 0.100 | 90.0 |" in own
    assert "| QAT | 70.00 | the same |" in own[own.index("### An earlier pair: the headline made again") :]
    write(tmp_path / "headline.jsonl", [row("student", None, 90, 1.0, "another")])
    assert "### The headline made again" not in "\n".join(report.pages(tmp_path, tmp_path)), "it was another student's"


def test_rows_at_other_rates_stand_apart(tmp_path: Path) -> None:
    untrained = [row("student", None, 80, 2.0), row("rtn_minmax", None, 60, 3.0), row("gptq", None, 70, 2.5)]
    write(tmp_path / "headline.jsonl", [*untrained, {**row("qat", 0, 70, 2.2), "rate": 1e-4}])
    assert report.rates_pages(tmp_path) == []
    write(tmp_path / "other_rates.jsonl", [{**row("qat", seed, 66, 2.2), "rate": 2e-5} for seed in range(2)])
    text = "\n".join(report.pages(tmp_path, tmp_path)).partition("### At other rates")[2]
    assert "Rates: QAT 2e-05." in text
    assert "| QAT | 2 | 66.00 ± 0.00 |" in text
    assert "30 % [30, 30]" in text, "(66 - 60) of 20"
    assert "GPTQ" not in text
    write(tmp_path / "headline.jsonl", [row("student", None, 80, 2.0, "another")])
    assert report.rates_pages(tmp_path) == [], "they were another student's"


def test_rows_of_a_folder_stand_beside_the_shipped_ones(tmp_path: Path) -> None:
    shipped, made = tmp_path / "shipped", tmp_path / "made"
    assert again.tables(made, shipped) == []
    for folder, student in ((shipped, "s"), (made, "another")):
        for name in ("headline.jsonl", "language/headline.jsonl", "small.jsonl"):
            write(folder / name, [row("student", None, 80, 2.0, student), row("qat", 0, 70, 2.2, student)])
    lines = again.tables(made, shipped)
    assert f"{made}/small.jsonl, of another student, beside {shipped}/small.jsonl" in lines
    assert len([line for line in lines if line.startswith("| student, BF16 | 80.00 | the same |")]) == 3
    assert len([line for line in lines if line.startswith("| QAT | 70.00 | the same |")]) == 3
    write(made / "headline.jsonl", [row("qat", seed, 70, 2.2) for seed in range(2)])
    lines = again.tables(made, shipped)
    assert any(line.startswith("| QAT | 70.00 | 70.00 [") for line in lines), "a seed that the shipped rows lack"
    noted = [row("qat", 0, 70, 2.2) | {"weights": "a"}, row("qat", 1, 72, 2.2) | {"weights": "b"}]
    write(tmp_path / "noted" / "headline.jsonl", noted)
    write(tmp_path / "one" / "headline.jsonl", [noted[0]])
    write(tmp_path / "other" / "headline.jsonl", [noted[0] | {"weights": "c"}])
    own, other = (again.tables(tmp_path / name, tmp_path / "noted") for name in ("one", "other"))
    assert any(" | the same, 1 of 2 seeds | " in line for line in own)
    assert not any("the same, " in line for line in other), "other weights, the same answers"
    assert not any("bits" in line for line in own)
    write(tmp_path / "newer" / "headline.jsonl", [noted[0] | {"torch": "3"}])
    said = (
        "made on cpu, torch 3, transformers 5; those on cpu, torch 2, transformers 5: intervals and not bits are to be"
    )
    assert f"{said} compared" in again.tables(tmp_path / "newer", tmp_path / "noted")
    command = [sys.executable, str(ROOT / "benchmarks" / "smollm2_again.py")]
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout == f"no rows in {tmp_path} yet that docs/results.md has, too\n"
    found = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, check=False)
    said = f"error: {tmp_path / 'no'} is no folder; expected one of rows, as in smollm2.py --out FOLDER\n"
    assert (found.returncode, found.stderr.endswith(said)) == (2, True)


def test_the_readme_has_both_headlines(tmp_path: Path) -> None:
    pictures = [row(name, None, right, 2.0) for name, right in (("student", 80), ("rtn_minmax", 60), ("gptq", 70))]
    write(tmp_path / "headline.jsonl", [*pictures, *(row("grace", seed, 72 + 2 * seed, 2.1) for seed in range(3))])
    write(tmp_path / "language" / "headline.jsonl", [row("grace", seed, 0, 3.0, "another") for seed in range(2)])
    lines = report.readme_table(tmp_path)
    assert lines[2] == "| student, BF16 |  | 80.0 |  |"
    assert "| GPTQ |  | 70.0 | 50 % |" in lines
    assert lines[-1] == "| GRACE | 20.1 ± 0.0 | 74.0 ± 2.0 | 70 % [45, 95] |"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_between(page, ["new", ""])
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="lacks the marks"):
        report.write_between(page, [])


def test_rows_of_two_teachers_are_not_mixed(tmp_path: Path, world: tuple[Exam, list[str]], in_a_folder: None) -> None:
    rows = [{**row("kd", seed, 70, 2.0), "teacher": f"t{seed}"} for seed in range(2)]
    write(tmp_path / "headline.jsonl", rows)
    with pytest.raises(SystemExit, match=r"kd w4g64 has rows of two teachers; give each a folder of its own \(--out\)"):
        report.pages(tmp_path, tmp_path)
    exam, overrides = world
    table = table_of.Table(tmp_path / "rows.jsonl", overrides, replace(exam, suite=None, questions=None, texts={}))
    taught = table.teacher_of(jobs_of.Job("kd", seed=0, rate=1e-4))
    assert taught == table.teacher_of(jobs_of.Job("teacher", "bf16")) != table.student
    assert taught == table_of.digest_of(str(table.recipe.model.teacher))
    for job in (jobs_of.Job("rtn"), jobs_of.Job("qat", seed=0, rate=1e-4), jobs_of.Job("student", "bf16")):
        assert table.teacher_of(job) is None


def test_rows_on_a_gpu_are_as_many_as_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one: dict[str, Any] = {
        "command": "headline",
        "language": False,
        "only": ["rtn", "awq", "gptq"],
        "overrides": [],
        "rates": None,
    }
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.share_of_gpus(None, argparse.Namespace(gpus=1, at_once=None, **one), tmp_path) == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for gib, cores, gpus, rows in ((140, 16, 1, 6), (140, 16, 2, 4), (80, 32, 1, 6), (24, 16, 1, 2), (8, 2, 1, 1)):
        free = [gib << 30, 144 << 30]  # the GPU with the least room decides
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda index, free=free: (free[index], 144 << 30))
        monkeypatch.setattr("os.sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        assert bench.rows_at_once(gpus, 40) == rows
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (140 << 30, 144 << 30))
    assert [bench.rows_at_once(2, left) for left in (0, 1, 3, 9)] == [1, 1, 2, 5]
    monkeypatch.setattr(bench, "student_of", lambda overrides: "a student")
    monkeypatch.setattr(bench, "digest_of", lambda student: "s")
    args = argparse.Namespace(gpus=1, at_once=None, **one)
    assert bench.share_of_gpus(None, args, tmp_path) == 3
    write(tmp_path / "headline.jsonl", [row("rtn", None, 1, 1.0), row("awq", None, 1, 1.0, "another")])
    assert bench.share_of_gpus(None, args, tmp_path) == 2
    for name in ("costs", "small"):
        assert bench.share_of_gpus(None, argparse.Namespace(**{**vars(args), "command": name}), tmp_path) == 1
    assert bench.share_of_gpus(None, argparse.Namespace(**{**vars(args), "at_once": 1}), tmp_path) == 1, "a child"


def test_questions_of_which_none_was_asked_have_no_score() -> None:
    one = {**row("rtn", None, 0, 1.0), "questions": {"correct": "--", "kinds": {}}}
    assert rows_of.right_of(one) is None
    assert "questions" not in rows_of.shown_of(one)


def test_validation_and_test_halves_are_apart() -> None:
    numbers = range(1000)
    validation = [number for number in numbers if rows_of.is_validation(number)]
    assert len(validation) == 500
    one = row("qat", 0, 40, 1.0)
    assert rows_of.validation_score(one) == 1.0
    assert report.test_right(one) == 40
    jobs = [job for job in jobs_of.search_jobs() if job.name in jobs_of.SEARCHED]
    searched = [{**row(job.name, job.seed, 40, 1.0), "scheme": job.scheme, "rate": job.rate} for job in jobs]
    searched[-2]["questions"] = {"correct": "0" * 200, "kinds": {}}
    assert jobs_of.best_rates(searched[::-1])["grace"] == searched[-1]["rate"]
    with pytest.raises(SystemExit, match=r"2 rows of the search are missing \(grace, qat\)"):
        jobs_of.best_rates(searched[1:-1])


def of_language(job: jobs_of.Job, loss: float) -> dict[str, Any]:
    made = {**row(job.name, job.seed, 0, loss), "scheme": job.scheme, "rate": job.rate}
    return {**made, "suite": {}, "questions": {}}


def test_rates_of_the_language_alone_are_chosen_by_loss_and_shown(tmp_path: Path) -> None:
    jobs = jobs_of.search_jobs(jobs_of.LANGUAGE_RATES)
    rows = [of_language(job, 3.0 + abs((job.rate or 0) - 2e-4)) for job in jobs]
    assert jobs_of.best_rates(rows, jobs_of.LANGUAGE_RATES) == dict.fromkeys(
        (*jobs_of.SEARCHED, *jobs_of.OWN_RATE), 2e-4
    )
    folder = tmp_path / rows_of.LANGUAGE_OUT.name
    write(folder / "search.jsonl", rows)
    seeds = [of_language(jobs_of.Job("grace", seed=seed, rate=2e-4), 2.0 - seed / 100) for seed in range(3)]
    signed = [of_language(jobs_of.Job("signed_scales", seed=seed, rate=2e-4), 1.9) for seed in range(3)]
    write(folder / "headline.jsonl", [of_language(jobs_of.Job("student", "bf16"), 1.5), *seeds])
    write(folder / "variants.jsonl", signed)
    text = "\n".join(report.pages(tmp_path, tmp_path))
    assert "### The language alone: four bits, groups of 64" in text
    assert "### The language alone: what might be better" in text
    assert "| perplexity, validation | 5e-05 | 0.0001 | 0.0002 | 0.0004 |" in text
    assert "| GRACE | 20.09 | 20.09 | 20.09 | 20.09 |" in text
    (line,) = [own for own in text.splitlines() if own.startswith("| `signed_scales` - GRACE | log perplexity")]
    assert line.endswith("| -0.10, -0.09, -0.08 |")
    assert "questions %" not in text.split("what might be better")[1].split("| difference of")[1]


def test_the_language_has_no_rows_about_pictures(world: tuple[Exam, list[str]], monkeypatch: Any, capsys: Any) -> None:
    exam, _ = world
    loaded = load_model(str(STUDENT), "cpu")
    own = replace(exam, suite=None, questions=None, limit=1)
    first, second, both = (
        Examination(one, loaded).windows["prose"] for one in (own, replace(own, first_window=1), replace(own, limit=2))
    )
    assert len(first) == len(second) == 1
    assert [window.tolist() for window in both] == [first[0].tolist(), second[0].tolist()]
    monkeypatch.setattr(bench, "write_language", lambda: STUDENT)
    for words, said in (
        (["others", "--language", "--only", "grace_no_gate,grace_no_relational"], "has no row grace_no_relational; it"),
        (["search", "--language", "--only", "sft"], "search has no row sft; it has from_signed_awq, grace, kd"),
    ):
        monkeypatch.setattr(sys, "argv", ["smollm2.py", *words])
        monkeypatch.setattr(bench, "Table", lambda *_: type("Made", (), {"student": "s"}))
        monkeypatch.setattr(bench, "searched_rates", lambda *_: dict.fromkeys(jobs_of.SEARCHED, 1e-4))
        with pytest.raises(SystemExit):
            bench.main()
        assert said in capsys.readouterr().err


def test_a_method_of_two_rates_is_no_method(tmp_path: Path) -> None:
    write(tmp_path / "headline.jsonl", [row("qat", 0, 1, 1.0), {**row("qat", 1, 1, 1.0), "rate": 1e-3}])
    with pytest.raises(SystemExit, match="qat w4g64 has two rates or a seed twice"):
        report.pages(tmp_path, tmp_path)


def test_the_clock_stops_a_run_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes the signal for itself and writes a checkpoint; what takes none is stopped all the same, and what
    swallows it is told again."""
    monkeypatch.setattr(bench, "ASK_AGAIN", 0.1)
    clock = bench.Clock(0.0)
    with pytest.raises(StoppedError, match="the time was up"), clock.stopping():
        time.sleep(5)

    def swallow() -> None:
        with pytest.raises(StoppedError):
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(StoppedError, match="the time was up"), clock.stopping():
        swallow()
    noted: list[int] = []
    with clock.stopping():
        signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
        time.sleep(0.5)
    assert noted == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_nothing_yet(tmp_path: Path) -> None:
    assert report.pages(tmp_path, tmp_path) == ["No rows yet: `make smollm2-small`, `make smollm2-headline`.", ""]


@pytest.mark.parametrize(("codes", "whole"), [((0, 0), 0), ((0, 3), 3), ((3, 0), 3), ((3, 1), 1), ((4, 0), 4)])
def test_each_gpu_has_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int], whole: int
) -> None:
    script = tmp_path / "command.py"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    script.write_text(
        "import os, sys; index = int(os.environ['CUDA_VISIBLE_DEVICES']) - 5\n"
        f"open({str(tmp_path)!r} + f'/{{index}}.txt', 'w').write(' '.join(sys.argv[1:])); sys.exit({codes}[index])\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    assert bench.on_gpus(2, 1, ["headline", "--gpus", "2", "--minutes", "9"]) == whole
    said = [(tmp_path / f"{index}.txt").read_text() for index in range(2)]
    assert said == ["headline --gpus 2 --minutes 9 --gpus=1 --at-once=1 --beside=0"] * 2


def test_rows_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, noted = tmp_path / "command.py", tmp_path / "noted"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    script.write_text(
        "import os, sys\n"
        "said = [os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:]]\n"
        f"open({str(noted)!r}, 'a').write(' '.join(said) + '\\n')\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(32)))
    assert bench.on_gpus(2, 3, ["search", "--at-once", "3"]) == 0
    words = "search --at-once 3 --gpus=1 --at-once=1 --beside=2"
    assert sorted(noted.read_text().splitlines()) == [f"5 {gpu} {words}" for gpu in (5, 5, 5, 6, 6, 6)]


def test_rows_that_are_made_at_once_have_places_of_their_own() -> None:
    jobs = jobs_of.search_jobs()
    assert len({jobs_of.first_stage(job) for job in jobs}) == len({job.label for job in jobs}) == len(jobs)


def test_whoever_is_free_takes_the_next_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process has begun is left to it, and what it has finished meanwhile is not made again."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    path = tmp_path / "headline.jsonl"
    jobs = [jobs_of.Job(name, "w4g64") for name in ("rtn", "awq", "gptq", "block")]

    class Quick(table_of.Table):
        def __init__(self) -> None:
            self.path, self.student, self.beside = path, "s", 2

        def row(self, job: jobs_of.Job) -> dict[str, Any]:
            made.append(job.name)
            if job.name == "rtn":  # meanwhile, elsewhere
                rows_of.append_row(path, {**row("gptq", None, 0, 1.0), "rate": None})
            return row(job.name, None, 0, 1.0)

    with rows_of.claim(table_of.claim_of(tmp_path / "headline.jsonl", jobs[1])) as is_ours:
        assert is_ours
        assert Quick().make(jobs, bench.Clock(None))
    assert made == ["rtn", "block"]
    assert [one["beside"] for one in rows_of.read_rows(path) if one["name"] != "gptq"] == [2, 2]
    assert Quick().make(jobs, bench.Clock(None))
    assert made == ["rtn", "block", "awq"]


def test_whoever_began_a_command_notes_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(command="headline", gpus=2, beside=None)

    def noted(device: str = "NVIDIA H200") -> list[dict[str, Any]]:
        with bench.noting_minutes(args, tmp_path):
            made = [{**row(name, None, 60, 3.0), "device": device} for name in ("rtn", "gptq")]
            write(tmp_path / "headline.jsonl", made)
            time.sleep(0.2)
        return rows_of.read_rows(tmp_path / "minutes.jsonl")

    (line,) = noted()
    assert 0.2 <= line.pop("seconds") < 5
    about = {"student": "s", "device": "NVIDIA H200", "commit": "c"}
    assert line == {"command": "headline", **about, "rows": 2, "gpus": 2}
    line = rows_of.read_rows(tmp_path / "minutes.jsonl")[0]
    args.beside = 0
    assert noted() == [line], "a process that shares the GPUs"
    args.beside = None
    with bench.noting_minutes(args, tmp_path):
        pass
    assert rows_of.read_rows(tmp_path / "minutes.jsonl") == [line], "nothing was made"
    assert noted("cpu")[-1]["gpus"] == 0


def test_the_file_is_a_program(in_a_folder: None) -> None:
    """Called as the Makefile calls it; nothing heavy is imported before the command is known."""
    command = [sys.executable, str(ROOT / "benchmarks" / "smollm2.py"), "data"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr == (
        "runs/world/conversations.jsonl does not exist; make it with make smollm2-data (docs/world.md)\n"
    )


def test_rows_of_pictures_are_there_several_times(in_a_folder: None) -> None:
    turns = [{"from": "human", "value": "é?"}, {"from": "gpt", "value": "yes"}]
    one, two, three = ({"id": name, "conversations": turns} for name in ("one", "two", "three"))
    write(bench.WORLD / "conversations.jsonl", [one])
    write(bench.WORLD / "captions.jsonl", [two])
    write(bench.PROSE / "train.jsonl", [three])
    count = 1 + sum(bench.TIMES.values())
    assert bench.join_rows(Path("out.jsonl")) == count
    found = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    again = [
        {**row, "id": f"{row['id']}-{time}" if time > 1 else row["id"]}
        for name, row in (("conversations", one), ("captions", two))
        for time in range(1, bench.TIMES[name] + 1)
    ]
    assert found == [*again, three]
    result = check_file(Path("out.jsonl"), None)
    assert (result.num_rows, result.num_good) == (count, count), "no row is another's double"


def test_rows_belong_to_weights_and_not_to_what_stands_beside_them(tmp_path: Path) -> None:
    """Another Transformers writes another configuration and the same weights."""
    shutil.copytree(STUDENT, tmp_path / "other")
    with (tmp_path / "other" / "config.json").open("a") as file:
        file.write("\n")
    assert table_of.digest_of(str(tmp_path / "other")) == table_of.digest_of(str(STUDENT))
    with (tmp_path / "other" / "model.safetensors").open("ab") as file:
        file.write(b"0")
    assert table_of.digest_of(str(tmp_path / "other")) != table_of.digest_of(str(STUDENT))


def test_questions_for_other_programs(world: tuple[Exam, list[str]], tmp_path: Path) -> None:
    exam, _ = world
    assert exam.questions is not None
    rows = runtimes.read_rows_evenly(exam.questions, 4)
    whole = runtimes.read_rows_evenly(exam.questions, 10_000)
    assert [row["id"] for row in rows] == [whole[len(whole) * k // 4]["id"] for k in range(4)]
    root = exam.questions.parent
    said = runtimes.by_engine(STUDENT, rows, root)
    assert list(said) == [row["id"] for row in rows]
    assert all(said.values())
    picture, text = runtimes.content_of(rows[0], root)
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": rows[0]["conversations"][0]["value"].split("\n", 1)[1]}
    asked = {"several": "<image>\n<image>\na?", "within": "in <image> a?", "plain": "<image>\na?", "text": "a?"}
    odd = [
        {"id": name, "conversations": [{"from": "human", "value": value}]}
        | ({} if name == "text" else {"image": ["a.png", "b.png"] if name == "several" else "a.png"})
        for name, value in asked.items()
    ]
    write(tmp_path / "odd.jsonl", odd)
    kept = runtimes.read_rows_evenly(tmp_path / "odd.jsonl", 9)
    assert [(row["id"], runtimes.question_of(row)) for row in kept] == [("plain", "a?"), ("text", "a?")]
    assert runtimes.content_of(kept[1], tmp_path) == [{"type": "text", "text": "a?"}]


def test_the_page_shows_what_other_programs_said(tmp_path: Path) -> None:
    answers = [
        {
            "id": str(n),
            "source": "a|b",
            "question": "What | is\n<it>?",
            "gold": "yes",
            "picture": "a.png" if n else None,
        }
        | {"said": {"engine": "yes", "vllm": "yes" if n else "no"}, "right": {"engine": True, "vllm": bool(n)}}
        for n in range(3)
    ]
    content = {
        "model": "GRACE",
        "weights": "0" * 32,
        "device": "cpu",
        "commit": "abc",
        "versions": {"vllm": "0.32.0"},
        "answers": answers,
    }
    (tmp_path / "runtimes.json").write_text(json.dumps(content))
    text = "\n".join(report.runtime_pages(tmp_path))
    assert "| our engine | 3 | 3 |\n| vLLM, CPU build 0.32.0 | 2 | 2 |" in text
    assert text.count("What \\| is<br>&lt;it&gt;? | yes | yes |") == 2
    assert not report.runtime_pages(tmp_path / "nothing")


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for words, said in (
        (["search", "--gpus", "9"], "--gpus is 9 and"),
        (["search", "--gpus", "0"], "--gpus is 0 and"),
        (["small", "--gpus", "2"], "--gpus and --at-once are for search, headline, others, variants; small runs alone"),
        (["search", "--at-once", "0"], "--at-once is 0; it is a number of rows, 1 or more"),
        (["search", "--language", "--at-once", "2"], "--language is for a CPU; leave --gpus and --at-once out"),
    ):
        monkeypatch.setattr(sys, "argv", ["smollm2.py", *words])
        with pytest.raises(SystemExit):
            bench.main()
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", [*bench.STAGES, "comparison"])
def test_stages_and_rows_repeat_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row need not be the first thing that its process multiplies, and cuBLAS looks once."""
    assert load_recipe(ROOT / "recipes" / "smollm2" / f"{name}.yaml", []).runtime.deterministic
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "taken away again at the end")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", name if name != "comparison" else "headline", "--minutes=0"])
    monkeypatch.setattr(bench, "run_stage", lambda *args: True)
    monkeypatch.setattr(bench, "share_of_gpus", lambda *args: sys.exit(0))
    with pytest.raises(SystemExit):
        bench.main()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_seconds_of_a_stage_add_up(tmp_path: Path) -> None:
    bench._add_seconds(tmp_path, 10)
    bench._add_seconds(tmp_path, 2.5)
    assert (tmp_path / "seconds.txt").read_text() == "12.5\n"
    bench._add_seconds(tmp_path / "nothing", 1)
    assert not (tmp_path / "nothing").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "tower"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "error: 2 processes were started, which make other weights than one; leave the" in capsys.readouterr().err


def test_what_was_made_again_has_the_hashes_that_it_had() -> None:
    folder = rows_of.OUT / "again"
    first = rows_of.read_stages(rows_of.OUT / "stages.json")
    others = [rows_of.read_stages(folder / f"stages{which}.json") for which in ("", "_second", "_third")]
    pair = {"teacher", "student"}
    assert [set(stages) for stages in others] == [pair, {"tower", *pair}, {"tower"}]
    for stages in others:
        assert all(made["weights"] == first[name]["weights"] for name, made in stages.items())
    _, lines, table = report.again_pages(rows_of.OUT)
    told = {line.split(" | ")[0]: line for line in table[2:]}
    assert {"| teacher, BF16", "| GPTQ", "| QAT", "| QAT with plain distillation", "| GRACE"} < set(told)
    assert all(line.count(" the same |") == 2 for line in told.values())
    assert "- Of 16 rows of the search 12 were made again: 12 are the same." in lines
    for name, trained in (("headline", 15), ("search", 12)):
        made, again = (
            {rows_of.key_of(row): row for row in rows_of.read_rows(where / f"{name}.jsonl")}
            for where in (rows_of.OUT, folder)
        )
        both = [(made[key], again[key]) for key in again if again[key]["steps"]]
        assert len(both) == trained
        assert all(one["weights"] == other["weights"] and one["last"] == other["last"] for one, other in both)
        assert all(one["commit"] != other["commit"] for one, other in both)
    headline = {rows_of.key_of(row): row for row in rows_of.read_rows(rows_of.OUT / "headline.jsonl")}
    rate = jobs_of.searched_rates(rows_of.OUT / "search.jsonl", None)["grace"]
    looked_at = json.loads((rows_of.OUT / "why.json").read_text())["weights"]
    assert looked_at == headline["grace", "w4g64", 0, rate]["weights"], "why is of the headline's first GRACE"
    log = (ROOT / "docs" / "log.md").read_text()
    seeds = {row["name"]: row for row in rows_of.read_rows(folder / "same_bits.jsonl") if row["seed"] == 0}
    for name, title in (("qat", "QAT (weights "), ("grace", "and GRACE (")):
        assert f"{title}{seeds[name]['weights'][:8]})" in log, "what the other machine had"
    searched = rows_of.OUT / report.EARLIER / "search.jsonl"
    assert f"--rates {searched.relative_to(ROOT)} model.student" in log
    rates = jobs_of.searched_rates(searched, None)
    assert {name: row["rate"] for name, row in seeds.items()} == {name: rates[name] for name in seeds}


def test_the_page_is_what_the_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing between the marks was written by hand, and no picture is another's."""
    monkeypatch.chdir(ROOT)
    table = [*report.readme_table(rows_of.OUT), ""]
    for page, lines in ((report.PAGE, report.pages(rows_of.OUT, tmp_path)), (report.README, table)):
        own = page.read_text(encoding="utf-8").partition(f"{report.BEGIN}\n")[2].partition(report.END)[0]
        assert own == "\n".join(lines)
    drawn, shown = ({one.name: one.read_text() for one in where.glob("smollm2*.svg")} for where in (tmp_path, IMAGES))
    assert drawn == shown
    assert len(drawn) == len(report.WHY)


def test_commands_out_of_order_are_one_line(in_a_folder: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "headline"])
    with pytest.raises(SystemExit) as stop:
        bench.run()
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert err.startswith("error: runs/smollm2/student does not exist; expected a model folder")
    assert err.endswith("(docs/results.md has the commands in their order)\n")


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "main", interrupted)
    with pytest.raises(SystemExit) as stop:
        bench.run()
    assert (stop.value.code, capsys.readouterr().err) == (
        130,
        "error: interrupted; the same command goes on where it stopped\n",
    )
