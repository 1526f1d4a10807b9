"""Questions of an evaluation on a CPU: our engine beside Transformers' ``generate``, on one folder of 4 bits.

    python benchmarks/bench_eval.py        # after grace demo, its grace_w4 -> benchmarks/results/cpu_eval.csv
    python benchmarks/bench_eval.py --model DIR --data FILE --batches 64 --questions 600 --rounds 5

Greedy, at most 16 tokens an answer; case ``grace_w4_b64``: the folder, and how many questions run together.

    transformers    the stock model in FP32 over the folder's BF16 weights: questions by length in left-padded batches,
                    through ``generate``
    ours_fp32       what ``grace eval`` does: engine/, codes of 4 bits, FP32 activations
    ours_int8       the same with --cpu-activations int8
    ours_baked      the engine in FP32 over the BF16 weights, without a kernel for codes

Metric ``questions_s``: questions a second, one sample a round. Questions are encoded and pictures decoded before, for
all of them. What a tower makes of a picture is not: ours makes it once for all questions of a picture, which is part
of the engine, ``generate`` once a question. Beside the rows, on the terminal: how many answers are Transformers' own.

Turns as in bench_cpu_linear.py: in rounds, each when all threads of this process sleep, after one that is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_cpu_linear import processor, timed_turns
from bench_loss import Parser, numbers_in, say
from bench_w4linear import names_in
from record import RESULTS, Row, place_of, row_of, write_rows

from grace_vlm.data.rows import IMAGE_MARKER
from grace_vlm.engine.open import open_model
from grace_vlm.engine.pictures import PictureFeatures
from grace_vlm.evals.run import EXACT, MAX_NEW_TOKENS, QuestionFile, answer_all, open_engine
from grace_vlm.models.load import LoadedModel, load_model

BENCH = "cpu_eval"
MODEL, DATA = Path("runs/demo/grace_w4"), Path("runs/demo/data/questions.jsonl")
BATCHES = (64,)
IMPLS = ("transformers", "ours_fp32", "ours_int8", "ours_baked")

Turn = Callable[[], list[str]]
"""Answers all questions; their texts in the file's order."""


def stock_batches(loaded: LoadedModel, questions: QuestionFile, root: Path, size: int) -> list[tuple[list[int], Any]]:
    """(entries, what the stock processor makes of them) of each left-padded batch, by length."""
    from PIL import Image

    loaded.processor.tokenizer.padding_side = "left"
    order = sorted(range(len(questions.entries)), key=lambda number: questions.entries[number][1].num_tokens)
    batches = []
    for start in range(0, len(order), size):
        numbers, texts, images = order[start : start + size], [], []
        for number in numbers:
            row, _ = questions.entries[number]
            words = row.turns[0].text.replace(IMAGE_MARKER, "").strip()
            content = [*({"type": "image"} for _ in row.images), {"type": "text", "text": words}]
            turns = [{"role": "user", "content": content}]
            texts.append(loaded.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
            images += [Image.open(root / name).convert("RGB") for name in row.images]
        batches.append((numbers, loaded.processor(text=texts, images=images, padding=True, return_tensors="pt")))
    return batches


def stock_turn(model: str, data: Path, num_questions: int, size: int) -> Turn:
    """Transformers' own."""
    loaded = load_model(model, "cpu")
    questions = QuestionFile(data, loaded, limit=num_questions)
    batches = stock_batches(loaded, questions, data.parent, size)

    def turn() -> list[str]:
        texts: dict[int, str] = {}
        for numbers, inputs in batches:
            with torch.inference_mode():
                made = loaded.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            new = made[:, inputs["input_ids"].shape[1] :]
            texts.update(zip(numbers, loaded.processor.batch_decode(new, skip_special_tokens=True), strict=True))
        return [texts[number] for number in range(len(questions.entries))]

    return turn


def our_turn(model: str, data: Path, num_questions: int, size: int, how: str) -> Turn:
    """The engine's, ``how``: fp32, int8 or baked; every turn begins without features of pictures."""
    loaded, codes = open_model(model, "cpu")
    questions = QuestionFile(data, loaded, limit=num_questions)
    options = replace(EXACT, max_running=size, max_step_tokens=max(2048, size))
    if how == "int8":
        options = replace(options, cpu_activations="int8")
    engine = open_engine(loaded, {} if how == "baked" else codes, questions, options)

    def turn() -> list[str]:
        seen = engine.pictures
        engine.pictures = PictureFeatures(seen.adapter, seen.model, seen.budget_bytes, seen.device)
        return [answer.answer for answer in answer_all(engine, questions)]

    return turn


def open_turn(impl: str, args: argparse.Namespace, size: int) -> Turn:
    model = str(args.model)
    if impl == "transformers":
        return stock_turn(model, args.data, args.questions, size)
    return our_turn(model, args.data, args.questions, size, impl.removeprefix("ours_"))


def measure(case: str, turns: dict[str, Turn], rounds: int, place: Row) -> list[Row]:
    """Rows of one case."""
    answers = {impl: turn() for impl, turn in turns.items()}  # the round that is not counted
    for impl, texts in answers.items():
        if "transformers" in answers:
            same = sum(a == b for a, b in zip(texts, answers["transformers"], strict=True))
            say(f"{case}: {impl} has {same} of {len(texts)} answers of transformers")
    samples = timed_turns(turns, rounds)
    speeds = {impl: [len(answers[impl]) / seconds for seconds in found] for impl, found in samples.items()}
    return [row_of(BENCH, case, impl, "questions_s", found, "1/s", place) for impl, found in speeds.items()]


def parser() -> Parser:
    made = Parser(prog="bench_eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, default=MODEL, help="model folder; default: %(default)s")
    made.add_argument("--data", type=Path, default=DATA, help="rows with one question each; default: %(default)s")
    made.add_argument("--questions", type=int, default=1200, help="the first so many; default: %(default)s")
    made.add_argument("--batches", help=f"questions that run together; default: {','.join(map(str, BATCHES))}")
    made.add_argument("--impls", default=",".join(IMPLS), help="default: %(default)s")
    made.add_argument("--rounds", type=int, default=7, help="counted ones; default: %(default)s")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's, the cores")
    made.add_argument("--out", type=Path, default=RESULTS / f"{BENCH}.csv", help="CSV whose rows are replaced")
    return made


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(argv)
    args.batches = numbers_in(made, "--batches", args.batches, BATCHES, "")
    args.impls = names_in(made, args.impls, IMPLS)
    if min(args.questions, args.rounds, args.threads) < 1:
        made.error("--questions, --rounds and --threads must be at least 1")
    for path in (args.model / "config.json", args.data):
        if not path.is_file():
            made.error(f"{path} is no file; run grace demo, or pass --model and --data")
    made.require_rows(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = settings(argv)
    torch.set_num_threads(args.threads)
    place = {**place_of(torch.device("cpu")), "device": processor(args.threads)}
    for size in args.batches:
        turns = {impl: open_turn(impl, args, size) for impl in args.impls}
        rows = measure(f"{args.model.name}_b{size}", turns, args.rounds, place)
        for row in rows:
            print(f"{row['case']}: {row['impl']} {float(row['p50']):.4g} questions a second", flush=True)
        write_rows(args.out, rows)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
