"""What ``grace eval --suite`` adds to the engine, and lmms-eval beside it, on one toy benchmark.

    python benchmarks/bench_eval_suite.py --lmms-python DIR/bin/python     # -> benchmarks/results/eval_suite.csv
    python benchmarks/bench_eval_suite.py --lmms-python DIR/bin/python --device cuda --impls engine,suite,lmms_hf

The rows are the toy suite's MMStar of as many seeds as ``--samples`` takes, asked as lmms-eval's ``mmstar`` asks them,
greedy; case ``toy_student_short_b64``: the folder, and how many questions run together; ``_gpu`` behind it on one.

    engine         ``LLM.answers`` over the prompts, pictures as bytes in memory
    suite          all that ``grace eval --suite`` does: rows, prompts, keys, pictures, engine, ledger, records, scores
    lmms_hf        lmms-eval with its own ``qwen3_vl``, as it is: BF16, Transformers' generate in padded batches
    lmms_hf_fp32   the same with FP32 weights, which that class has no argument for: BF16 is slow on most CPUs
    lmms_grace     lmms-eval with ``--model grace_vlm``

``lmms_*`` run in an environment of their own (the extra ``lmms``), each in its process, which waits while others run.
Start-up is left out for all: imports, weights, and of lmms-eval also reading the rows. Metrics: ``samples_s``, samples
a second, and ``samples_cpu_s``, samples a second of processor time, which other programs on the machine disturb less.
A sample a round, in turns, after a round that is not counted; with ``--cold``, and ``_cold`` behind the case, one round
and none before it, so that graphs that are captured and kernels that are loaded count. One thread each unless
``--threads`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from bench_cpu_linear import processor
from bench_loss import Parser, say
from bench_w4linear import names_in
from record import RESULTS, ROOT, place_of, row_of, write_rows

from grace_vlm.data.pictures import largest_area
from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.llm import LLM, Asked, Parts
from grace_vlm.engine.open import open_model
from grace_vlm.engine.pictures import PictureFeatures
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.evals.suite.ledger import Ledger
from grace_vlm.evals.suite.responders import EngineResponder
from grace_vlm.evals.suite.run import ask, questions_of, read_benchmarks, write_scores
from grace_vlm.evals.tasks.task import Picture
from grace_vlm.evals.toy import mmstar

BENCH, MODEL = "eval_suite", ROOT / "assets" / "toy-student"
IMPLS = ("engine", "suite", "lmms_hf", "lmms_hf_fp32", "lmms_grace")
TASK, NEVER_SAID = "local_mmstar", "<|vision_end|>"
WITHOUT_SYSTEM = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list -%}\n"
_FIND = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"


@dataclass(frozen=True)
class Pass:
    """One turn of an implementation: what it took, how much it said, and the score, which an engine has not."""

    seconds: float
    cpu_seconds: float
    replies: int
    tokens: int
    score: float | None = None


Turn = Callable[[], Pass]


def write_benchmark(folder: Path, samples: int) -> Path:
    """``folder/mmstar/mmstar.parquet``: the toy MMStar of seed 0, 1, 2 ..., cut after ``samples`` rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, found = [], 0
    for seed in count():
        mmstar.write(folder / f"seed-{seed}", seed)
        tables.append(pq.read_table(folder / f"seed-{seed}" / "mmstar.parquet"))
        found += len(tables[-1])
        if found >= samples:
            break
    whole = pa.concat_tables(tables).slice(0, samples)
    index = whole.schema.get_field_index("index")
    whole = whole.set_column(index, whole.schema.field(index), pa.array(range(samples), pa.int64()))
    file = folder / "suite" / "mmstar" / "mmstar.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(whole, file)
    return file


def prepared(model: Path, folder: Path, never_ends: bool) -> Path:
    """A copy of the model whose chat template leaves out a system turn: lmms-eval's Qwen3-VL class always adds one, and
    the toys, which never saw any, would answer another question there. ``never_ends``: its end token is another one,
    so that every answer is as long as the task allows."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("manifest.*"))
    template = folder / "chat_template.jinja"
    template.write_text(WITHOUT_SYSTEM + template.read_text(encoding="utf-8"), encoding="utf-8")
    if never_ends:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        (number,) = (one["id"] for one in vocabulary["added_tokens"] if one["content"] == NEVER_SAID)
        for name, key, value in (
            ("tokenizer_config.json", "eos_token", NEVER_SAID),
            ("generation_config.json", "eos_token_id", number),
        ):
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps({**content, key: value}), encoding="utf-8")
    return folder


def opened_llm(model: str, size: int, device: str) -> LLM:
    """As ``grace eval --suite`` opens one."""
    loaded, codes = open_model(model, device)
    options = EngineOptions(max_running=size, max_step_tokens=max(2048, size), cache_tokens=16_384)
    return LLM(loaded, options=options, quantized=codes, max_pixels=largest_area(loaded.processor))


def forget_pictures(llm: LLM) -> None:
    seen = llm.engine.pictures
    llm.engine.pictures = PictureFeatures(seen.adapter, seen.model, seen.budget_bytes, seen.device)


def engine_turn(model: str, rows: Path, size: int, device: str) -> Turn:
    """The engine over prompts that are made before."""
    llm, asked = opened_llm(model, size, device), []
    for question in questions_of(read_benchmarks(["mmstar"], rows.parents[1])[0], ["lmms"]):
        parts = tuple(part.load() if isinstance(part, Picture) else part for part in question.parts)
        asked.append(Asked(question.key, Parts(parts), (), SamplingParams(question.max_new_tokens)))

    def turn() -> Pass:
        forget_pictures(llm)
        started, used, replies, tokens = time.perf_counter(), time.process_time(), 0, 0
        for _, answer in llm.answers(asked):
            replies, tokens = replies + 1, tokens + len(answer.token_ids)  # type: ignore[union-attr]
        return Pass(time.perf_counter() - started, time.process_time() - used, replies, tokens)

    return turn


def suite_turn(model: str, rows: Path, size: int, device: str) -> Turn:
    """Everything, from the rows to the scores."""
    llm = opened_llm(model, size, device)

    def turn() -> Pass:
        forget_pictures(llm)
        with tempfile.TemporaryDirectory() as made:
            out = Path(made) / "out"
            started, used = time.perf_counter(), time.process_time()
            benchmarks, _ = read_benchmarks(["mmstar"], rows.parents[1])
            ledger = Ledger(out, {"model": model}, resume=False)
            ask(benchmarks, ["lmms"], EngineResponder(llm), ledger)
            report = write_scores(benchmarks, ["lmms"], ledger.replies, out, None)["lmms"]["mmstar"]
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
        tokens = sum(reply.tokens[1] for reply in ledger.replies.values() if reply.tokens)
        return Pass(seconds, cpu_seconds, report.num_questions, tokens, report.metrics["macro"].value)

    return turn


def lmms_turn(args: argparse.Namespace, impl: str, model: Path, rows: Path) -> Turn:
    """lmms-eval in its own environment, open and waiting."""
    found = subprocess.run([args.lmms_python, "-c", _FIND], capture_output=True, text=True, check=True, cwd=rows.parent)
    tasks = rows.parents[2] / "tasks"
    tasks.mkdir(exist_ok=True)
    stated = {
        "include": f"{found.stdout.strip()}/tasks/mmstar/mmstar.yaml",
        "task": TASK,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"val": str(rows)}},
    }
    (tasks / f"{TASK}.yaml").write_text(json.dumps(stated), encoding="utf-8")
    arguments, stock = f"pretrained={model},device={args.device}", impl != "lmms_grace"
    if stock:  # the areas of the model's own processor: that class has others by default
        size = json.loads((model / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]["size"]
        arguments += f",device_map={args.device},min_pixels={size['shortest_edge']},max_pixels={size['longest_edge']}"
    command = [args.lmms_python, Path(__file__).with_name("lmms_peer.py"), tasks, TASK]
    command += ["qwen3_vl" if stock else "grace_vlm", arguments, args.batch, "--threads", args.threads]
    command += ["--fp32"] if impl.endswith("fp32") else []
    errors = (rows.parents[2] / f"{impl}.log").open("w")
    peer: Any = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=tasks
    )

    def answer() -> dict[str, Any]:
        line = peer.stdout.readline()
        if not line:
            raise RuntimeError(f"{impl} ended: {Path(errors.name).read_text(encoding='utf-8')[-2000:]}")
        content: dict[str, Any] = json.loads(line)
        return content

    answer()

    def turn() -> Pass:
        peer.stdin.write("\n")
        peer.stdin.flush()
        return Pass(**answer())

    return turn


def measure(turns: dict[str, Turn], rounds: int, samples: int, is_cold: bool) -> dict[str, list[Pass]]:
    """Passes of the counted rounds. Everyone must have answered every row; what they said is told."""
    found: dict[str, list[Pass]] = {impl: [] for impl in turns}
    for number in range(1 if is_cold else 0, rounds + 1):
        for impl, turn in turns.items():
            one = turn()
            if one.replies != samples:
                raise ValueError(f"{impl} has {one.replies} replies; expected {samples}")
            score = "" if one.score is None else f", score {one.score:.4f}"
            which = f"round {number}" if number else "warm-up"
            say(f"{which}: {impl} {one.seconds:.1f} s, {one.tokens} tokens{score}")
            if number:
                found[impl].append(one)
    return found


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    made = Parser(prog="bench_eval_suite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, default=MODEL, help="a Qwen3-VL folder; default: the shipped toy student")
    made.add_argument("--lmms-python", type=Path, help="of an environment with this package's extra lmms")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    made.add_argument("--samples", type=int, default=2000, help="default: %(default)s")
    made.add_argument("--batch", type=int, default=64, help="questions together; default: %(default)s")
    made.add_argument("--impls", default=",".join(IMPLS), help="default: %(default)s")
    made.add_argument("--long", action="store_true", help="answers never end before the longest, 128 tokens")
    made.add_argument("--rounds", type=int, default=5, help="counted ones; default: %(default)s")
    made.add_argument("--cold", action="store_true", help="one round, and none that is not counted before it")
    made.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    made.add_argument("--out", type=Path, default=RESULTS / f"{BENCH}.csv", help="CSV whose rows are replaced")
    args = made.parse_args(argv)
    args.rounds = 1 if args.cold else args.rounds
    args.impls = names_in(made, args.impls, IMPLS)
    if min(args.samples, args.batch, args.rounds, args.threads) < 1:
        made.error("--samples, --batch, --rounds and --threads must be at least 1")
    if not (args.model / "config.json").is_file():
        made.error(f"{args.model / 'config.json'} is no file; pass --model")
    if any(impl.startswith("lmms") for impl in args.impls) and args.lmms_python is None:
        made.error("lmms-eval has an environment of its own; pass --lmms-python, or --impls engine,suite")
    made.require_rows(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = settings(argv)
    torch.set_num_threads(args.threads)
    place = place_of(torch.device(args.device))
    if args.device == "cpu":
        place["device"] = processor(args.threads)
    with tempfile.TemporaryDirectory() as made:
        rows = write_benchmark(Path(made), args.samples)
        model = prepared(args.model, Path(made) / args.model.name, args.long)
        ours = {"engine": engine_turn, "suite": suite_turn}
        turns = {
            impl: ours[impl](str(model), rows, args.batch, args.device)
            if impl in ours
            else lmms_turn(args, impl, model, rows)
            for impl in args.impls
        }
        found = measure(turns, args.rounds, args.samples, args.cold)
    case = f"{args.model.name.replace('-', '_')}_{'long' if args.long else 'short'}_b{args.batch}"
    case += ("_gpu" if args.device == "cuda" else "") + ("_cold" if args.cold else "")
    written = []
    for impl, passes in found.items():
        for metric, seconds in (
            ("samples_s", [one.seconds for one in passes]),
            ("samples_cpu_s", [one.cpu_seconds for one in passes]),
        ):
            speeds = [args.samples / one for one in seconds]
            written.append(row_of(BENCH, case, impl, metric, speeds, "1/s", place))
            print(f"{case}: {impl} {float(written[-1]['p50']):.4g} {metric}", flush=True)
    write_rows(args.out, written)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
