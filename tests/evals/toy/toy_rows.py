"""The suite's rows, read back with pyarrow, pandas and json alone."""

from __future__ import annotations

import ast
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet

Row = dict[str, Any]
Asked = tuple[str, bytes, str]
"""(question, PNG, text of the right answer)."""


def parquet(path: Path) -> list[Row]:
    return pyarrow.parquet.read_table(path).to_pylist()


def tsv(path: Path) -> pandas.DataFrame:
    return pandas.read_csv(path, sep="\t")


def hallusion(suite: Path) -> list[Row]:
    folder = suite / "hallusion"
    return parquet(folder / "image-00000-of-00001.parquet") + parquet(folder / "non_image-00000-of-00001.parquet")


def mmmu(suite: Path) -> list[Row]:
    return [row for path in sorted((suite / "mmmu").rglob("*.parquet")) for row in parquet(path)]


def asked(suite: Path) -> Iterator[Asked]:
    """Every question about one picture of every benchmark, with the words of its gold."""
    for row in hallusion(suite):
        if row["image"]:
            yield row["question"], row["image"]["bytes"], {"1": "yes", "0": "no"}[row["gt_answer"]]
    for row in tsv(suite / "mmbench" / "mmbench_dev_en_toy.tsv").to_dict("records"):
        yield row["question"], base64.b64decode(row["image"]), str(row[row["answer"]])
    problems = json.loads((suite / "scienceqa" / "problems.json").read_text())
    for path in sorted((suite / "scienceqa" / "images").rglob("image.png")):
        problem = problems[path.parent.name]
        yield problem["question"], path.read_bytes(), problem["choices"][problem["answer"]]
    for name in ("masked", "no_mask"):
        for row in parquet(suite / "ai2d" / name / "test-00000-of-00001.parquet"):
            yield row["question"], row["image"]["bytes"], row["options"][int(row["answer"])]
    for row in mmmu(suite):
        question = row["question"].replace("<image 1>", "").strip()
        options = ast.literal_eval(row["options"])
        if "<image" not in question + row["options"] and row["image_1"]:
            gold = options["ABCDEFGH".index(row["answer"])] if options else row["answer"]
            gold = ast.literal_eval(gold)[0] if gold.startswith("[") else gold
            yield question, row["image_1"]["bytes"], gold
    for row in json.loads((suite / "seed" / "SEED-Bench.json").read_text())["questions"]:
        if row["data_type"] == "image":
            png = (suite / "seed" / "SEED-Bench-image" / row["data_id"]).read_bytes()
            yield row["question"], png, row[f"choice_{row['answer'].lower()}"]
    for row in tsv(suite / "mmstar" / "MMStar.tsv").to_dict("records"):
        yield row["question"].removeprefix("<image 1>\n"), base64.b64decode(row["image"]), str(row[row["answer"]])
