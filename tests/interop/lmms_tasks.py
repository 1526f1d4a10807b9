"""lmms-eval's own tasks on local files: a task file that includes the shipped one, over rows in the hub's columns."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from environments import clean_variables

from grace_vlm.evals.tasks.task import Doc

_FIND = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Shipped:
    """One of lmms-eval's tasks. ``file``: below its ``tasks``. ``metric``: of its ``process_results``, several with
    bars where a row has one of them. ``ours``: the name of the same number in our report."""

    file: str
    split: str
    metric: str
    ours: str


SHIPPED = {
    "mmbench": Shipped("mmbench/mmbench_en_dev_static.yaml", "dev", "gpt_eval_score", "circular"),
    "scienceqa": Shipped("scienceqa/scienceqa.yaml", "test", "exact_match", "overall"),
    "ai2d": Shipped("ai2d/ai2d.yaml", "test", "exact_match", "accuracy"),
    "ai2d_no_mask": Shipped("ai2d/ai2d_no_mask.yaml", "test", "exact_match", "accuracy"),
    "mmmu": Shipped("mmmu/mmmu_val.yaml", "validation", "mmmu_acc", "accuracy"),
    "seed": Shipped("seedbench/seedbench.yaml", "test", "seed_image", "accuracy"),
    "mmstar": Shipped("mmstar/mmstar.yaml", "val", "average", "macro"),
    "pope": Shipped("pope/pope.yaml", "test", "pope_accuracy", "accuracy"),
    "gqa": Shipped("gqa/gqa.yaml", "testdev", "exact_match", "accuracy"),
    "vqav2": Shipped("vqav2/vqav2_val.yaml", "validation", "exact_match", "accuracy"),
    "textvqa": Shipped("textvqa/textvqa_val.yaml", "validation", "exact_match", "accuracy"),
    "vizwiz": Shipped("vizwiz_vqa/vizwiz_vqa_val.yaml", "val", "exact_match", "accuracy"),
    "mme": Shipped("mme/mme.yaml", "test", "mme_perception_score|mme_cognition_score", "perception"),
}
"""By our names: every task with the profile ``lmms``."""


def local_name(name: str) -> str:
    return f"local_{name}"


def write_task(folder: Path, python: Path, name: str, files: Sequence[Path]) -> None:
    """The task file ``local_<name>`` in ``folder``, over Parquet files."""
    found = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, check=True, env=clean_variables())
    shipped = SHIPPED[name]
    stated = {
        "include": f"{found.stdout.strip()}/tasks/{shipped.file}",
        "task": local_name(name),
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {shipped.split: [str(file) for file in files]}},
        **({"process_docs": None} if name == "gqa" else {}),  # which fetches its pictures from the hub
    }
    folder.mkdir(parents=True, exist_ok=True)
    # JSON is YAML.
    (folder / f"{local_name(name)}.yaml").write_text(json.dumps(stated, indent=1), encoding="utf-8")


def write_hub_rows(file: Path, name: str, docs: Sequence[Doc]) -> Path:
    """Rows of a benchmark whose local layout lmms-eval does not read, as its repository on the hub has them."""
    rows = [_HUB_ROWS[name](doc) for doc in docs]
    kinds = {"image": pa.list_(_PICTURE) if name == "seed" else _PICTURE}
    columns = {column: pa.array([row[column] for row in rows], kinds.get(column)) for column in rows[0]}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def _picture(doc: Doc) -> dict[str, Any] | None:
    return {"bytes": doc.images[0].load(), "path": None} if doc.images else None


def _mmbench(doc: Doc) -> dict[str, Any]:
    """Empty cells are the text ``nan`` there."""
    named = {"index": int(doc.id), "question": doc.question, "hint": "nan" if doc.hint is None else doc.hint}
    named |= {letter: doc.options.get(letter, "nan") for letter in "ABCD"} | {"answer": doc.gold}
    named |= {"category": doc.columns["category"], "L2-category": doc.columns["l2-category"]}
    return named | {"source": "s", "split": "dev", "image": _picture(doc)}


def _scienceqa(doc: Doc) -> dict[str, Any]:
    answer, hint = list(doc.options).index(doc.gold), doc.hint or ""
    named = {"question": doc.question, "choices": list(doc.options.values()), "answer": answer, "hint": hint}
    return named | {"image": _picture(doc)}


def _seed(doc: Doc) -> dict[str, Any]:
    named = {f"choice_{letter.lower()}": text for letter, text in doc.options.items()}
    named |= {"question": doc.question, "answer": doc.gold, "data_type": "image", "question_id": doc.id}
    return named | {"image": [_picture(doc)]}


def _gqa(doc: Doc) -> dict[str, Any]:
    return {"id": doc.id, "question": doc.question, "answer": doc.gold, "image": _picture(doc)}


_HUB_ROWS: dict[str, Callable[[Doc], dict[str, Any]]] = {
    "mmbench": _mmbench,
    "scienceqa": _scienceqa,
    "seed": _seed,
    "gqa": _gqa,
}
