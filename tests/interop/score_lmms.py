"""Runs in an environment with lmms-eval: what its own tasks make of replies, and what they ask.

    python score_lmms.py TASKS CASES.json OUT.json

TASKS is a folder of task files. CASES: {task: {"metric": a key of process_results, "cases": a list of {"row", "reply",
"golds": cells}, "column": that golds are put into, "rounds": lists of a reply for each row}}. OUT: {task: {"prompts" of
the rows, "kwargs" of generation, "scores": of each case under each of its golds, "said": the answer where the task
returns one, "drawn": cases where a letter was drawn at random, "aggregates" of the rounds}}.

A letter that lmms-eval draws at random is "?" here, so that it is seen.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager, get_task_dict
from PIL import Image

DRAWN: list[str] = []


def draw(choices: list[str]) -> str:
    DRAWN.append("?")
    return "?"


def processed(task: Any, doc: dict[str, Any], reply: str) -> dict[str, Any]:
    """A reply through the task's filters and its scoring, as the evaluator sends it."""
    about = {"task": task.config.task, "doc_id": 0, "repeats": 1}
    instance = Instance("generate_until", (), 0, metadata=about, resps=[reply])
    (pipeline,) = task._filters
    pipeline.apply([instance], [doc])
    return task.process_results(copy.deepcopy(doc), [instance.filtered_resps[pipeline.name]])


def aggregate(task: Any, metric: str, values: list[Any]) -> float:
    if metric == "gpt_eval_score":  # its own writes a file beside
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

        return float(mmbench_evaluator.eval_result(values, "static")[0])
    return float(task.aggregation()[metric](values))


def value_of(task: Any, metric: str, result: dict[str, Any]) -> float:
    """Of one row. Where the task leaves the judgement to its aggregate, that of this row alone."""
    value = next((result[name] for name in metric.split("|") if name in result), None)
    if isinstance(value, dict):
        if "score" in value:
            return float(value["score"])
        # MMBench counts questions: a rotation alone is none.
        value = {**value, "index": value["index"] % 1_000_000} if "index" in value else value
        return aggregate(task, metric, [value])
    return float(value)


def prompt_of(task: Any, doc: dict[str, Any]) -> list[str]:
    (message,) = task.doc_to_messages(doc)
    return [
        part["text"]
        if part["type"] == "text"
        else "picture " + hashlib.sha256(part["url"].convert("RGB").tobytes()).hexdigest()
        for part in message["content"]
    ]


def opened(doc: dict[str, Any]) -> dict[str, Any]:
    """Pictures as ``datasets`` opens them where a file's schema says that they are some."""

    def cell(value: Any) -> Any:
        if isinstance(value, list):
            return [cell(one) for one in value]
        return Image.open(io.BytesIO(value["bytes"])) if isinstance(value, dict) and "bytes" in value else value

    return {name: cell(value) for name, value in doc.items()}


def run(task: Any, asked: dict[str, Any]) -> dict[str, Any]:
    docs = [opened(doc) for doc in task.eval_docs]
    metric, column = asked["metric"], asked["column"]
    scores, said, drawn = [], [], []
    for case in asked["cases"]:
        doc, before, results = docs[case["row"]], len(DRAWN), []
        for gold in case["golds"]:
            result = processed(task, {**doc, column: gold}, case["reply"])
            results.append(value_of(task, metric, result))
            answer = result.get("submission", {})
        scores.append(results)
        said.append(answer.get("answer") if isinstance(answer, dict) and column == "answers" else None)
        drawn.append(len(DRAWN) > before)
    aggregates = []
    for replies in asked["rounds"]:
        results = [processed(task, doc, reply) for doc, reply in zip(docs, replies, strict=True)]
        name = metric.split("|")[0]
        aggregates.append(aggregate(task, name, [result[name] for result in results if name in result]))
    prompts = [prompt_of(task, doc) for doc in docs]
    kwargs = task.config.generation_kwargs
    return {
        "prompts": prompts,
        "kwargs": kwargs,
        "scores": scores,
        "said": said,
        "drawn": drawn,
        "aggregates": aggregates,
    }


def main() -> int:
    folder, cases, out = sys.argv[1:]
    asked = json.loads(Path(cases).read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):
        manager = TaskManager(include_path=folder, model_name="grace_vlm")
        tasks = get_task_dict(list(asked), manager, "chat")
        random.choice = draw  # type: ignore[assignment]
        found = {name: run(tasks[name], own) for name, own in asked.items()}
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
