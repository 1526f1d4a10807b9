"""Replies -> records and reports. Every profile reads the same replies; nothing is asked here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.atomic import write_bytes_atomic
from grace_vlm.evals.suite.ledger import Reply
from grace_vlm.evals.suite.questions import Benchmark
from grace_vlm.evals.tasks.task import Doc, Metric, Profile, Record, Report, Task, failed_record, record_of


def score(benchmark: Benchmark, profile: Profile, replies: Mapping[str, Reply]) -> tuple[list[dict[str, Any]], Report]:
    """(a line for each row, the report) of a benchmark under one profile. A row without a reply counts as wrong."""
    task = benchmark.task
    lines, records = [], []
    for doc in benchmark.docs:
        question = benchmark.question(doc, profile)
        reply = replies.get(question.key)
        record = _record(task, doc, profile, reply)
        records.append(record)
        control = {} if benchmark.control is None else {"control": benchmark.control.name}
        lines.append({**_line(doc, record, reply, question.key), **control})
    return lines, task.aggregate(records, profile)


def _record(task: Task, doc: Doc, profile: Profile, reply: Reply | None) -> Record:
    if reply is None or reply.text is None:
        return failed_record(task, doc, "not asked" if reply is None else reply.error or "no reply")
    return record_of(task, doc, reply.text, profile)


def _line(doc: Doc, record: Record, reply: Reply | None, key: str) -> dict[str, Any]:
    return {
        "id": doc.id,
        "key": key,
        "question": doc.question,
        "options": dict(doc.options),
        "gold": doc.gold,
        "raw": None if reply is None else reply.text,
        "parsed": record.extract.value,
        "rule": record.extract.rule,
        "status": record.extract.status,
        "score": record.score,
        "groups": dict(record.groups),
        "prompt": "" if reply is None else reply.prompt,
        "pictures": [] if reply is None else list(reply.pictures),
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object a row, in the order of the benchmark's file: the same bytes however the answers came."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    write_bytes_atomic(path, text.encode("utf-8", "surrogatepass"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Inverse of ``write_lines``."""
    return [json.loads(line) for line in path.read_bytes().decode("utf-8", "surrogatepass").split("\n") if line]


def as_json(report: Report) -> dict[str, Any]:
    """A report for a file."""
    return asdict(report)


def said(metric: Metric) -> str:
    """A metric as it is printed: value, interval, and how many of how many were scored; of no rows there is none."""
    if not metric.num_total:
        return f"- 0/0 {metric.unit}"
    scale = 100.0 if metric.upper == 1.0 else 1.0
    value, low, high = (format(scale * number, ".1f") for number in (metric.value, metric.low, metric.high))
    return f"{value} [{low}, {high}] {metric.num_scored}/{metric.num_total} {metric.unit}"
