"""lmms-eval's own tasks beside our profile of its name, and lmms-eval with our model.

The environment has lmms-eval and this package with its extra ``lmms``. Its tasks run on local files: the shipped task
files are included, only where their rows come from is another. GRACE_INTEROP_LMMS_PYTHON names an environment that
is there already.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from environments import REPOSITORY, Base, clean_variables, environment, module_of, record, run_script
from lmms_answers import choice_replies, open_replies, yes_no_replies
from lmms_tasks import SHIPPED, local_name, write_hub_rows, write_task
from PIL import Image

from grace_vlm.evals.lmms import MAX_NEW_TOKENS
from grace_vlm.evals.tasks.registry import TASKS
from grace_vlm.evals.tasks.task import Doc, Task, record_of

SCRIPT = Path(__file__).with_name("score_lmms.py")
STUDENT = REPOSITORY / "assets" / "toy-student"
NUM_NOISE, NUM_ROUNDS, NUM_LEAST = 400, 25, 500
DRAWS_A_LETTER = "lmms-eval draws a letter at random for a reply that it cannot read; ours is unparsed, and wrong"
DIFFERENCES: Mapping[str, str] = {"mmmu": DRAWS_A_LETTER}
"""Task -> the one way in which it is not lmms-eval's (docs/evaluation.md)."""

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[Path]:
    packages = ["-e", f"{REPOSITORY}[lmms]"]
    yield from environment(tmp_path_factory.mktemp("lmms"), "GRACE_INTEROP_LMMS_PYTHON", packages, base)


@dataclass(frozen=True)
class Case:
    """A reply to a row, and what its gold answer is taken to be in turn: our docs, and lmms-eval's cells."""

    row: int
    reply: str
    docs: tuple[Doc, ...]
    cells: tuple[Any, ...]


OPEN_GOLDS = (
    *("10", "['8.4', '8.4 V']", "Bar chart", "B", "-3.5", "1,200", "yes", "0.33", "10 V", "traffic light", "t-shirt"),
    *("cat", "a cat.", "left", "2", "zürich", "1e3"),
)
TEN_EACH = ("cat", "a cat.", "two", "Don't", "it's", "3.14", "1,200", "ma'am", "unanswerable", "left/right")


def golds_of(name: str, doc: Doc) -> tuple[tuple[Doc, ...], tuple[Any, ...]]:
    """Everything that the gold answer could be, and the cell that says so."""
    if doc.kind == "open" and doc.answers:
        lists = [doc.answers, *((said,) * 10 for said in TEN_EACH), (*TEN_EACH,)]
        cells: list[Any] = [list(one) for one in lists]
        if name == "vqav2":
            cells = [[{"answer": said, "answer_id": number} for number, said in enumerate(one)] for one in lists]
        return tuple(replace(doc, answers=tuple(one)) for one in lists), tuple(cells)
    values = {"yes_no": ("yes", "no"), "open": (doc.gold, *OPEN_GOLDS), "choice": tuple(doc.options)}[doc.kind]
    as_place = name in ("ai2d", "ai2d_no_mask", "scienceqa")
    cells = [list(doc.options).index(value) if as_place else value for value in values]
    if name.startswith("ai2d"):
        cells = [str(cell) for cell in cells]
    return tuple(replace(doc, gold=value) for value in values), tuple(cells)


def replies_to(doc: Doc, seed: int) -> list[str]:
    if doc.kind == "choice":
        return choice_replies(doc.options, seed, NUM_NOISE)
    return yes_no_replies(seed, NUM_NOISE) if doc.kind == "yes_no" else open_replies((doc.gold,), seed, NUM_NOISE)


def cases_of(name: str, docs: Sequence[Doc]) -> list[Case]:
    """Of every kind of question that a task has: its replies, each to one row in turn."""
    found: dict[tuple[int, str], Case] = {}
    for kind in dict.fromkeys(doc.kind for doc in docs):
        own = [doc for doc in docs if doc.kind == kind][:4]
        for place, doc in enumerate(own):
            ours, cells = golds_of(name, doc)
            for reply in replies_to(doc, doc.row)[place :: len(own)]:
                found.setdefault((doc.row, reply), Case(doc.row, reply, ours, cells))
    return list(found.values())


def data_of(name: str, folder: Path) -> tuple[list[Doc], list[Path]]:
    """(rows of a small benchmark in the true layout, the files that lmms-eval reads them from)."""
    WRITERS = module_of("tests/evals/tasks", "task_files").WRITERS
    source = WRITERS[name](folder)
    docs = list(TASKS[name].docs(source))
    if name in ("mmbench", "scienceqa", "seed", "gqa"):
        return docs, [write_hub_rows(folder / "hub" / "rows.parquet", name, docs)]
    if name == "mmstar":  # options are columns in the other layout: the same questions
        module_of("tests/evals/tasks", "task_files").mmstar(folder)
        docs = list(TASKS[name].docs(folder / "mmstar.parquet"))
        return docs, [folder / "mmstar.parquet"]
    if name == "mmmu":
        return docs, sorted(folder.glob("*/validation-*.parquet"))
    return docs, sorted(folder.rglob("*.parquet"))


def our_prompt(task: Task, doc: Doc) -> list[str]:
    def shown(data: bytes) -> str:
        pixels = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
        return "picture " + hashlib.sha256(pixels).hexdigest()

    return [part if isinstance(part, str) else shown(part.load()) for part in task.prompt(doc, "lmms")]


def test_every_task_of_the_profile_is_compared() -> None:
    assert set(SHIPPED) == {name for name, task in TASKS.items() if "lmms" in task.about.profiles}


def test_replies_are_read_and_scored_as_lmms_eval_does(python: Path, tmp_path: Path) -> None:
    docs: dict[str, list[Doc]] = {}
    cases: dict[str, list[Case]] = {}
    rounds: dict[str, list[list[str]]] = {}
    asked = {}
    for name, shipped in SHIPPED.items():
        docs[name], files = data_of(name, tmp_path / name)
        write_task(tmp_path / "tasks", python, name, files)
        cases[name] = cases_of(name, docs[name])
        kinds = [replies_to(doc, 1000 + doc.row) for doc in docs[name]]
        # Right answers too: a round of noise alone would score nothing.
        rounds[name] = [
            [
                doc.gold if (doc.row + number) % 3 == 0 else own[37 * number]
                for doc, own in zip(docs[name], kinds, strict=True)
            ]
            for number in range(NUM_ROUNDS)
        ]
        asked[local_name(name)] = {
            "metric": shipped.metric,
            "column": "answers" if docs[name][0].answers else "answer",
            "cases": [{"row": one.row, "reply": one.reply, "golds": one.cells} for one in cases[name]],
            "rounds": rounds[name],
        }
    (tmp_path / "cases.json").write_text(json.dumps(asked), encoding="utf-8")
    run_script(python, SCRIPT, tmp_path / "tasks", tmp_path / "cases.json", tmp_path / "out.json")
    theirs = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    report = {
        name: compared(TASKS[name], docs[name], cases[name], rounds[name], theirs[local_name(name)]) for name in SHIPPED
    }
    record("lmms", report)
    for name, figures in report.items():
        assert figures["replies"] >= NUM_LEAST, name
        assert figures["differences"] == [], name
        assert figures["prompts"] == "equal", name
        assert figures["aggregates"] == "equal", name
        assert (figures["drawn"] > 0) == (name in DIFFERENCES), name


def compared(
    task: Task, docs: Sequence[Doc], cases: Sequence[Case], rounds: Sequence[Sequence[str]], theirs: Mapping[str, Any]
) -> dict[str, Any]:
    """What differs. A parsed answer is told by the golds under which it is right."""
    differences, parsed = [], 0
    for case, scores, said in zip(cases, theirs["scores"], theirs["said"], strict=True):
        extracts = [task.extract(case.reply, doc, "lmms") for doc in case.docs]
        ours = [task.score(doc, one, "lmms") for doc, one in zip(case.docs, extracts, strict=True)]
        parsed += any(ours)
        is_other = said is not None and said != task.lmms_normal(extracts[0].value or "")  # type: ignore[attr-defined]
        if is_other or any(abs(a - b) > 1e-9 for a, b in zip(ours, scores, strict=True)):
            differences.append([case.row, case.reply, extracts[0].value, ours, scores, said])
    most, budgets = theirs["kwargs"].get("max_new_tokens", MAX_NEW_TOKENS), set()
    wrong = []
    for doc, prompt in zip(docs, theirs["prompts"], strict=True):
        budgets.add(task.max_new_tokens(doc, "lmms"))
        if our_prompt(task, doc) != prompt:
            wrong.append([our_prompt(task, doc), prompt])
    name = task.about.name
    uneven = []
    for replies, value in zip(rounds, theirs["aggregates"], strict=True):
        records = [record_of(task, doc, reply, "lmms") for doc, reply in zip(docs, replies, strict=True)]
        ours = task.aggregate(records, "lmms").metrics[SHIPPED[name].ours].value
        if abs(ours - value) > 1e-5:  # MMMU's is rounded to five digits
            uneven.append([ours, value])
    return {
        "replies": len(cases),
        "right under some gold": parsed,
        "drawn": sum(theirs["drawn"]),
        "differences": differences[:20],
        "prompts": "equal" if not wrong and budgets == {most} else [wrong, most, sorted(budgets)],
        "aggregates": uneven or "equal",
        "rounds": len(rounds),
        "drawn because": DIFFERENCES.get(name, ""),
    }


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from grace_vlm.evals.toy.suite import write_toy_suite

    folder = tmp_path_factory.mktemp("toy") / "suite"
    write_toy_suite(folder)
    return folder


TOY_FILES = {"ai2d": "masked/*.parquet", "mmstar": "*.parquet", "mmmu": "*/validation-*.parquet"}
"""Of the toy suite those whose layout is that of the hub."""


def run_lmms(python: Path, folder: Path, tasks: Sequence[str], model_args: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "lmms_eval", "--model", "grace_vlm", "--model_args", model_args, "--include_path", folder]
    command += ["--tasks", ",".join(map(local_name, tasks)), "--batch_size", "16", "--device", "cpu", "--log_samples"]
    own = clean_variables() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command += ["--output_path", str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, env=own, cwd=folder, timeout=1200)


def test_the_model_scores_there_what_grace_eval_says(python: Path, suite: Path, tmp_path: Path) -> None:
    for name, pattern in TOY_FILES.items():
        write_task(tmp_path, python, name, sorted((suite / name).glob(pattern)))
    ran = run_lmms(python, tmp_path, tuple(TOY_FILES), f"pretrained={STUDENT},batch_invariant=True")
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    (results,) = tmp_path.glob("out/*/*_results.json")
    theirs = json.loads(results.read_text(encoding="utf-8"))["results"]
    grace = [sys.executable, "-m", "grace_vlm.cli.main", "eval", STUDENT, "--suite", "card", "--data", suite]
    grace += ["--out", tmp_path / "ours", "--profile", "lmms", "--batch-invariant", "--device", "cpu"]
    grace += [word for name in TOY_FILES for word in ("--task", name)]
    # One thread in both: several that wait for each other take minutes where the cores are shared.
    one_thread = clean_variables() | {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, grace)), check=True, capture_output=True, timeout=1200, env=one_thread)
    ours = json.loads((tmp_path / "ours" / "scores.json").read_text(encoding="utf-8"))["scores"]["lmms"]
    for name in TOY_FILES:
        replies = [json.loads(line) for line in next(tmp_path.glob(f"out/*/*_{local_name(name)}.jsonl")).open()]
        own = [json.loads(line) for line in (tmp_path / "ours" / "records" / "lmms" / f"{name}.jsonl").open()]
        by_row = {one["doc_id"]: one for one in replies}
        assert len(by_row) == len(own)
        if name != "ai2d":  # its filter writes over what the model said
            assert [by_row[row]["filtered_resps"] for row in range(len(own))] == [one["raw"] for one in own], name
        assert all(one["token_counts"][0]["input_tokens"] > 20 for one in replies)
        # A letter is drawn where MMMU's reply is unread: the others are compared one by one.
        metric = next(
            value for key, value in theirs[local_name(name)].items() if key.split(",")[0] == SHIPPED[name].metric
        )
        unread = ours[name]["num_unparsed"] if name in DIFFERENCES else 0
        difference = len(own) * (metric - ours[name]["metrics"][SHIPPED[name].ours]["value"])
        assert -1e-3 < difference <= unread + 1e-3, (name, difference)
    assert sum(one["score"] for one in own) > 0


def test_what_cannot_be_done_is_said(python: Path, suite: Path, tmp_path: Path) -> None:
    write_task(tmp_path, python, "mmstar", [suite / "mmstar" / "mmstar.parquet"])
    ran = run_lmms(python, tmp_path, ("mmstar",), f"pretrained={STUDENT},beams=2")
    assert not (tmp_path / "out").exists()  # lmms-eval ends with status 0 all the same
    assert "--model_args has beams, which grace_vlm does not know; leave it out" in ran.stdout + ran.stderr
    # A task that asks for what the engine does not have.
    file = tmp_path / f"{local_name('mmstar')}.yaml"
    stated = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**stated, "generation_kwargs": {"num_beams": 4}}), encoding="utf-8")
    ran = run_lmms(python, tmp_path, ("mmstar",), f"pretrained={STUDENT}")
    assert not (tmp_path / "out").exists()
    expected = "local_mmstar, row 0: num_beams is 4; expected 1: the engine searches no beams"
    assert expected in ran.stdout + ran.stderr
