"""Runs in an environment with lmms-eval: one of its models on a local task, a pass for every line on standard input.

    python lmms_peer.py TASKS TASK MODEL ARGUMENTS BATCH_SIZE [--fp32]

TASKS is a folder of task files, MODEL and ARGUMENTS are lmms-eval's ``--model`` and ``--model_args``. Model and rows
are opened first; a pass is ``lmms_eval.evaluator.evaluate``: its requests, the model, its scores. Standard output has
a line of JSON when all is open, and one after every pass: {"seconds", "cpu_seconds", "replies", "tokens", "score"}.
``--fp32``: the weights in FP32, which lmms-eval's Qwen3-VL class has no argument for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

import torch


def opened(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, its task by name)."""
    from lmms_eval import models
    from lmms_eval.tasks import TaskManager, get_task_dict

    model = models.get_model(args.model).create_from_arg_string(args.arguments, {"batch_size": args.batch_size})
    if args.fp32:
        model._model.float()
    model.clean = lambda: None  # with which an evaluation ends: it takes the weights away, and there is another pass
    # Some tasks have words of their own for a model; the name asks for the default ones, whichever model it is.
    tasks = get_task_dict([args.task], TaskManager(include_path=args.tasks, model_name="default"), "chat")
    model.task_dict[args.task] = tasks[args.task].dataset
    return model, tasks


def one_pass(model: Any, tasks: Any) -> dict[str, Any]:
    from lmms_eval.evaluator import evaluate

    if hasattr(model, "llm"):  # ours keeps what its tower made of a picture
        from grace_vlm.engine.pictures import PictureFeatures

        seen = model.llm.engine.pictures
        model.llm.engine.pictures = PictureFeatures(seen.adapter, seen.model, seen.budget_bytes, seen.device)
    started, used = time.perf_counter(), time.process_time()
    found = evaluate(lm=model, task_dict=tasks, bootstrap_iters=0)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    ((name, own),) = found["results"].items()
    counts = [one["token_counts"][0]["output_tokens"] for one in found["samples"][name]]
    score = next(value for key, value in own.items() if key.split(",")[0] == "average")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "replies": len(counts),
        "tokens": sum(counts),
        "score": score,
    }


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tasks", "task", "model", "arguments"):
        made.add_argument(name)
    made.add_argument("batch_size", type=int)
    made.add_argument("--fp32", action="store_true")
    made.add_argument("--threads", type=int, default=1)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    # lmms-eval prints; what this program says goes to the output that it was given.
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with contextlib.redirect_stdout(sys.stderr):
        model, tasks = opened(args)
        said.write(json.dumps({"opened": args.model}) + "\n")
        for _ in sys.stdin:
            said.write(json.dumps(one_pass(model, tasks)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
