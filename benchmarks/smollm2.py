"""Proof on pretrained weights: SmolLM2 with a small tower, where four bits hurt, and what each method gives back.

    python benchmarks/smollm2.py data             # runs/world and runs/text as one file to train on
    python benchmarks/smollm2.py tower            # recipes/smollm2/tower.yaml; teacher and student: theirs
    python benchmarks/smollm2.py search           # a learning rate for each trained method
    python benchmarks/smollm2.py headline         # every method at W4 g64, five seeds
    python benchmarks/smollm2.py others           # W8, W3, W4 g32; GRACE without each part; BF16, trained as long
    python benchmarks/smollm2.py variants         # what might be better than GRACE as published
    python benchmarks/smollm2.py costs            # what each method of the headline takes, alone on its GPU
    python benchmarks/smollm2.py small            # language alone, one seed, on two CPU cores
    python benchmarks/report_smollm2.py           # docs/results.md from what they left

``--language`` makes the rows of search, headline, others and variants of the language alone, without a GPU: SmolLM2
is student and teacher, a row is two or three minutes of two cores.

Each ends after ``--minutes`` with what was finished, and exit code 3 if some is left: the same command goes on, on
another day or machine. ``--gpus N`` makes rows on N at once, ``--at-once M`` M of them on each, as many as have room if
left out (a row alone keeps its GPU waiting for the host; the times of rows that share one say nothing of a method,
``costs`` does): whoever is free takes the next, and so does the same command begun twice. Rows are lines of
``benchmarks/results/smollm2/<command>.jsonl`` with every answer's score, and the hash of the student they belong to:
rows of another student are left out, never mixed.

Stages and trained rows repeat to the bit on the same kind of GPU with the same versions (``runtime.deterministic``): a
trained row's ``weights`` are the hash of what was trained (rows without are older, and do not). A stage is one process:
two share out its batches, sum in another order, and make another pair.

All trained rows have the same data, order of rows per seed and number of steps (``recipes/smollm2/comparison.yaml``);
they differ by overrides (``smollm2_jobs.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import commit_name, device_name
from smollm2_jobs import (
    ALONE,
    JOBS,
    LANGUAGE_RATES,
    PICTURED,
    RATES,
    RECIPES,
    RUNS,
    SEARCHED,
    Job,
    search_jobs,
    searched_rates,
    small_jobs,
)
from smollm2_rows import (
    LANGUAGE_OUT,
    MINUTES_FILE,
    OUT,
    STAGES_FILE,
    append_row,
    is_reported,
    is_validation,
    read_rows,
    read_stages,
)
from smollm2_table import (
    CALIBRATION_ROWS,
    SMALL_CALIBRATION_ROWS,
    Table,
    digest_of,
    done_rows,
    repeat_to_the_bit,
    student_of,
)

from grace_vlm.checkpoint.atomic import write_bytes_atomic, write_json_atomic

WORLD, TEXT, SUITE = Path("runs/world"), Path("runs/text"), Path("runs/toy-suite")

PROSE = Path("runs/prose")
"""As ``TEXT``, with nearly every paragraph to train on: a teacher that had read the 3,000 there five times knew them by
heart (perplexity 8), and the language no more (104 of other paragraphs, from 36)."""

ROWS = RUNS / "train.jsonl"

TIMES = {"conversations": 2, "captions": 3}
"""So often a row of these is in ``ROWS``: their answers are 12 and 21 tokens, a paragraph is 85, and the loss is a mean
over tokens, three quarters of them so of pictures; a caption is what teaches to read one whole."""

SMALL = (
    f"data.train={TEXT / 'train.jsonl'}",
    "data.root=null",
    "data.micro_batch_size=4",
    "data.workers=0",
    "data.packing=false",
    "runtime.cuda_graphs=false",
    "optim.num_steps=30",
)
"""Of ``small``: the rows of text, and as many as two cores take in half an hour."""

SMALL_WINDOWS = 8
"""Of 512 tokens (``--limit``: others); a search reads as many behind them."""

LEFT_OVER = 3
"""Exit code: the time is up and work is left."""

ASK_AGAIN = 5.0
"""Seconds, twice, after which a run that did not hear that its time is up is told again."""

ROW_GIB, MOST_AT_ONCE = 12, 6
"""What a row takes of a GPU's memory at most (10 were seen), and how many. Seven at once on an H200 have their models
after 9 to 13 seconds each, one alone after 16 to 22."""

SHARED = ("search", *(name for name in JOBS if name not in ALONE))
"""Commands whose rows may share a GPU."""

STAGES = ("tower", "teacher", "student")
"""Recipes of the pair, in order; each run is ``runs/smollm2/<recipe>``."""


class Clock:
    """The minutes that there are, and a run that is stopped with a checkpoint when they are over."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, training gets what a scheduler would send it, and stops with a checkpoint; while a run is opened or
        published it is ``StoppedError`` at once, and what is on the disk stays as it is."""
        if self.end is None:
            yield
            return
        before = signal.signal(signal.SIGUSR1, _stop_at_once)
        is_left, main, seconds = threading.Event(), threading.get_ident(), max(0.1, self.end - time.monotonic())

        def ask() -> None:
            """Until training has noted it: what is raised while a run is opened, somebody else's code may swallow."""
            wait = seconds
            while not is_left.wait(wait):
                signal.pthread_kill(main, signal.SIGUSR1)
                wait = ASK_AGAIN
                if is_left.wait(wait) or signal.getsignal(signal.SIGUSR1) is not _stop_at_once:
                    return

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            is_left.set()
            asking.join()
            signal.signal(signal.SIGUSR1, before)


def _stop_at_once(number: int, frame: Any) -> None:
    from grace_vlm.errors import StoppedError

    raise StoppedError("the time was up while the run was opened or published", number)


def join_rows(out: Path) -> int:
    """Conversations about pictures and captions, ``TIMES`` of each, and rows of text in one file; how many rows."""
    pictures, text = {WORLD / f"{name}.jsonl": times for name, times in TIMES.items()}, PROSE / "train.jsonl"
    for part in (*pictures, text):
        if not part.is_file():
            sys.exit(f"{part} does not exist; make it with make smollm2-data (docs/world.md)")
    parts = []
    for part, times in pictures.items():
        once = part.read_bytes()
        shown = [json.loads(line) for line in once.splitlines()]
        again = ({**row, "id": f"{row['id']}-{number}"} for number in range(2, times + 1) for row in shown)
        parts += [once, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in again).encode()]
    content = b"".join((*parts, text.read_bytes()))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(out, content)
    return content.count(b"\n")


def run_stage(name: str, clock: Clock, overrides: Sequence[str], noted: Path) -> bool:
    """Train a stage, going on where it stopped; whether it is complete. What it took goes to the folder ``noted``."""
    import torch

    from grace_vlm.errors import ConfigError, StoppedError
    from grace_vlm.train.config import load_recipe
    from grace_vlm.train.loop import train

    out, started = RUNS / name, time.monotonic()
    if clock.is_over:
        return False
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    if recipe.runtime.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"no GPU is usable, and {name} is far too long for a CPU; make smollm2-small is for CPUs")
    try:
        with clock.stopping():
            train(recipe, out, resume=True, notify=print, progress=_say)
    except StoppedError as stopped:
        print(f"{name}: {stopped}")
        return False
    finally:
        _add_seconds(out, time.monotonic() - started)
    note_stage(name, noted / STAGES_FILE)
    print(f"{name} is complete: {out / 'final'}", flush=True)
    return True


def _say(report: Any, num_steps: int) -> None:
    done = report.step + 1
    if done % 100 == 0 or done == num_steps:
        print(f"  step {done} of {num_steps}, loss {report.loss:.4f}", flush=True)


def _add_seconds(out: Path, seconds: float) -> None:
    """Of a stage's run, over all the times it was begun: ``seconds.txt`` beside its checkpoints."""
    if not out.is_dir():
        return
    path = out / "seconds.txt"
    before = float(path.read_text()) if path.is_file() else 0.0
    path.write_text(f"{before + seconds:.1f}\n")


def note_stage(name: str, path: Path) -> None:
    """The hash, GPU seconds, device and commit of a run that is complete; one that is noted already stays as it is."""
    import torch

    stages, weights = read_stages(path), digest_of(str(RUNS / name))
    if stages.get(name, {}).get("weights") != weights:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seconds = float((RUNS / name / "seconds.txt").read_text())
        made = {"weights": weights, "seconds": seconds, "device": device_name(device), "commit": commit_name()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**stages, name: made})


@contextlib.contextmanager
def noting_minutes(args: argparse.Namespace, out: Path) -> Iterator[None]:
    """What the rows inside take together: ``MINUTES_FILE`` has a line of whoever began the command, and none of the
    processes that share its GPUs."""
    path, started = out / f"{args.command}.jsonl", time.monotonic()
    before = len(read_rows(path))
    try:
        yield
    finally:
        made = read_rows(path)[before:]
        if args.beside is None and made:
            about = {name: made[-1][name] for name in ("student", "device", "commit")}
            took = {"rows": len(made), "seconds": round(time.monotonic() - started, 1)}
            gpus = 0 if about["device"] == "cpu" else args.gpus
            append_row(out / MINUTES_FILE, {"command": args.command, **about, "gpus": gpus, **took})


def write_language() -> Path:
    """SmolLM2 with a tower that nobody asks, as a model folder."""
    from grace_vlm.formats.publish import publish_model
    from grace_vlm.models.smollm2 import build_smollm2, build_smollm2_processor

    out = RUNS / "language"
    if not (out / "config.json").is_file():
        processor = build_smollm2_processor()
        model = build_smollm2("smollm2:30", processor)
        publish_model(out, model, processor, {}, (), "# SmolLM2 in LLaVA\n\nThe tower is random.\n", overwrite=True)
    return out


def require_gpus(made: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """An error for GPUs that are not there, and for a command that has no rows to share."""
    import torch

    if args.command not in SHARED:
        made.error(f"--gpus and --at-once are for {', '.join(SHARED)}; {args.command} runs alone")
    if args.at_once is not None and args.at_once < 1:
        made.error(f"--at-once is {args.at_once}; it is a number of rows, 1 or more")
    if not 1 <= args.gpus <= torch.cuda.device_count():
        made.error(f"--gpus is {args.gpus} and {torch.cuda.device_count()} GPUs are here")


def rows_at_once(num_gpus: int, num_left: int) -> int:
    """As many on each GPU as its free memory, and the host's cores by twos, are enough for; no more than there are."""
    import torch

    room = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(num_gpus)) // (ROW_GIB << 30)
    cores = len(os.sched_getaffinity(0)) // (2 * num_gpus)
    return max(1, min(MOST_AT_ONCE, room, cores, -(-num_left // num_gpus)))


def rows_left(args: argparse.Namespace, out: Path) -> int:
    """How many of a command's rows are not in its file."""
    student = digest_of(student_of(args.overrides))
    jobs = jobs_of(args, out, student)
    return len({job.key for job in jobs} - done_rows(out / f"{args.command}.jsonl", student))


def share_of_gpus(made: argparse.ArgumentParser, args: argparse.Namespace, out: Path) -> int:
    """Rows on each GPU at once: as asked for, or as many as there is room for."""
    import torch

    if (args.gpus, args.at_once) not in ((1, None), (1, 1)):
        if args.language:
            made.error("--language is for a CPU; leave --gpus and --at-once out")
        require_gpus(made, args)
    if args.at_once is not None:
        return int(args.at_once)
    if args.language or args.command not in SHARED or not torch.cuda.is_available():
        return 1
    try:
        return rows_at_once(args.gpus, rows_left(args, out))
    except ValueError as error:
        made.error(str(error))


def on_gpus(count: int, at_once: int, arguments: Sequence[str]) -> int:
    """The same command in so many processes on each of so many GPUs; the exit code of all together. They share out the
    cores: six that had 32 threads each on 32 cores took seven minutes to open what takes one half a minute."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if given is None else given.split(",")[:count]
    names *= at_once
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(names)))
    with contextlib.ExitStack() as running:
        started = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, *arguments, "--gpus=1", "--at-once=1", f"--beside={at_once - 1}"],
                    env={"OMP_NUM_THREADS": threads, **os.environ, "CUDA_VISIBLE_DEVICES": name},
                )
            )
            for name in names
        ]

        def end_all(number: int, frame: Any) -> None:
            for one in started:
                one.terminate()

        before = signal.signal(signal.SIGTERM, end_all)
        codes = [one.wait() for one in started]
        signal.signal(signal.SIGTERM, before)
    faults = [code for code in codes if code not in (0, LEFT_OVER)]
    return faults[0] if faults else max(codes)


def jobs_of(args: argparse.Namespace, out: Path, student: str) -> list[Job]:
    """The rows that a command names; ``ValueError`` says which it does not have."""
    rates = LANGUAGE_RATES if args.language else RATES
    if args.command not in JOBS:
        return named(search_jobs(rates) if args.command == "search" else small_jobs(), args)
    jobs = named(JOBS[args.command](dict.fromkeys(SEARCHED, rates[0])), args)
    if all(job.rate is None for job in jobs):  # nothing is trained, and no search is waited for
        return jobs
    searched = searched_rates(args.rates or out / "search.jsonl", None if args.rates else student, rates)
    return named(JOBS[args.command](searched), args)


def named(jobs: Sequence[Job], args: argparse.Namespace) -> list[Job]:
    """Those that ``--language`` and ``--only`` leave."""
    if args.language:
        jobs = [job for job in jobs if job.name not in (*PICTURED, "teacher")]
    names = sorted({job.name for job in jobs})
    if unknown := sorted(set(args.only or ()) - set(names)):
        raise ValueError(f"{args.command} has no row {unknown[0]}; it has {', '.join(names)}")
    return [job for job in jobs if not args.only or job.name in args.only]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("command", choices=("data", *STAGES, "search", *JOBS, "small"))
    made.add_argument("overrides", nargs="*", help="key=value of the recipes")
    made.add_argument("--minutes", type=float, help="no row is begun after so many; a stage stops with a checkpoint")
    made.add_argument("--language", action="store_true", help="the language alone, on two CPU cores")
    made.add_argument("--only", type=lambda text: text.split(","), help="names of rows, with commas; all if left out")
    made.add_argument("--out", type=Path, help=f"folder of the rows; {OUT}, or {LANGUAGE_OUT} with --language")
    made.add_argument(
        "--rates", type=Path, help="rows of a search; the student's own search.jsonl in --out if left out"
    )
    made.add_argument("--gpus", type=int, default=1, help="that make rows at once")
    made.add_argument("--at-once", type=int, help="rows on each GPU at once; as many as there is room for")
    made.add_argument("--beside", type=int, help=argparse.SUPPRESS)
    made.add_argument("--limit", type=int, help="questions of each benchmark, of the file, and windows of each text")
    args = made.parse_intermixed_args()
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        made.error(f"{processes} processes were started, which make other weights than one; leave the launcher out")
    if args.command == "data":
        print(f"{join_rows(ROWS):,} rows in {ROWS}")
        return
    if args.command in STAGES and (args.language or args.only):
        made.error(f"--language and --only are of rows, and {args.command} is a training run of pictures")
    if args.command == "costs" and args.language:
        made.error("costs are of a GPU; rows of --language were made alone and have their times")
    repeat_to_the_bit()
    clock = Clock(args.minutes)
    out = args.out or (LANGUAGE_OUT if args.language else OUT)
    if args.command in STAGES:
        sys.exit(0 if run_stage(args.command, clock, args.overrides, out) else LEFT_OVER)
    at_once = share_of_gpus(made, args, out)
    if (args.gpus, at_once) != (1, 1):
        with noting_minutes(args, out):
            code = on_gpus(args.gpus, at_once, sys.argv[1:])
        sys.exit(code)
    from smollm2_measure import Exam

    overrides, calibration_rows = list(args.overrides), CALIBRATION_ROWS
    exam = Exam(SUITE, WORLD / "test.jsonl", {"prose": TEXT / "heldout.txt"}, limit=args.limit, is_asked=is_reported)
    if args.language or args.command == "small":
        calibration_rows = SMALL_CALIBRATION_ROWS
        language = write_language()
        overrides = [*SMALL, f"model.student={language}", f"model.teacher={language}", *overrides]
        exam = replace(exam, suite=None, questions=None, limit=args.limit or SMALL_WINDOWS)
        if args.command == "search":
            exam = replace(exam, first_window=exam.limit or 0)
    elif args.command == "search":  # asked is what chooses a rate, and nothing that the report tests on
        exam = replace(exam, suite=None, texts={}, is_asked=is_validation)
    elif args.command == "costs":  # the headline asks
        exam = replace(exam, suite=None, questions=None, texts={})
    table = Table(out / f"{args.command}.jsonl", overrides, exam, calibration_rows, args.beside or 0)
    try:
        jobs = jobs_of(args, out, table.student)
    except ValueError as error:
        made.error(str(error))
    with noting_minutes(args, out):
        is_whole = table.make(jobs, clock)
    sys.exit(0 if is_whole else LEFT_OVER)


def run(program: Callable[[], None] | None = None) -> None:
    """A program, ``main`` if left out, with an error that a user can cause as one line."""
    from grace_vlm.cli.output import fail
    from grace_vlm.errors import GraceError

    try:
        (program or main)()
    except GraceError as error:
        fail(f"{error} (docs/results.md has the commands in their order)", error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where it stopped", 128 + signal.SIGINT)


if __name__ == "__main__":
    run()
