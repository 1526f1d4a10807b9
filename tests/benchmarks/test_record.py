"""The CSV schema of the GPU benchmarks: columns, percentiles, rows that are replaced, where and when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import record  # noqa: E402

CPU = torch.device("cpu")
PLACE = {
    "device": "cpu", "driver": "", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc", "date": "2026-11-25",
}  # fmt: skip


def row(case: str, impl: str, samples: list[float], metric: str = "ms") -> record.Row:
    return record.row_of("loss", case, impl, metric, samples, "ms", PLACE)


def test_percentiles_lie_between_the_samples() -> None:
    assert record.percentiles([4.0, 0.0, 2.0, 1.0, 3.0]) == pytest.approx((0.8, 2.0, 3.2))
    assert record.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_file_word_for_word(tmp_path: Path) -> None:
    record.write_rows(tmp_path / "new" / "x.csv", [row("n8", "ours", [1.0, 2.0, 30.123456789])])
    assert (tmp_path / "new" / "x.csv").read_text() == (
        "bench,case,impl,metric,p20,p50,p80,unit,device,driver,torch,triton,commit,date\n"
        "loss,n8,ours,ms,1.4,2,18.8741,ms,cpu,,2.11.0,3.6.0,abc,2026-11-25\n"
    )


def test_rows_of_a_key_are_replaced_in_their_place_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    record.write_rows(path, [row("n8", "ours", [1]), row("n8", "liger", [2]), row("n8", "ours", [3], "extra_gb")])
    record.write_rows(path, [row("n16", "ours", [4]), row("n8", "ours", [5])])
    found = [(r["case"], r["impl"], r["metric"], r["p50"]) for r in record.read_rows(path)]
    assert found == [
        ("n8", "ours", "ms", "5"),
        ("n8", "liger", "ms", "2"),
        ("n8", "ours", "extra_gb", "3"),
        ("n16", "ours", "ms", "4"),
    ]


def test_a_file_of_another_schema_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("case,seconds\na,1\n")
    with pytest.raises(ValueError, match=r"x\.csv has other columns than bench,case,"):
        record.write_rows(path, [row("n8", "ours", [1])])
    assert path.read_text() == "case,seconds\na,1\n"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.csv"
    record.write_rows(path, [row("n8", "ours", [1])])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        record.write_rows(path, [{**row("n9", "ours", [1]), "surplus": "1"}])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        record.write_rows(path, [row("n9", "ours", [1])])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_dirty_when_a_tracked_file_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRACE_COMMIT", raising=False)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "benchmarks" / "results" / "x.csv").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    (tmp_path / "untracked.py").write_text("1\n")
    (tmp_path / "benchmarks" / "results" / "x.csv").write_text("2\n")
    assert record.commit_name(tmp_path) == commit
    (tmp_path / "code.py").write_text("2\n")
    assert record.commit_name(tmp_path) == f"{commit}-dirty"


def test_the_commit_of_a_copy_is_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GRACE_COMMIT", raising=False)
    assert record.commit_name(tmp_path) == "unknown"
    monkeypatch.setenv("GRACE_COMMIT", "abc-dirty")
    assert record.commit_name(tmp_path) == "abc-dirty"
    monkeypatch.delenv("GRACE_COMMIT")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit_name(ROOT) == "unknown", "no git on the path"
    assert record.driver_version() == "", "no nvidia-smi on the path"


def test_the_place_of_a_cpu() -> None:
    place = record.place_of(CPU)
    assert tuple(place) == record.COLUMNS[8:]
    assert (place["device"], place["driver"], place["torch"]) == ("cpu", "", torch.__version__)
    assert len(place["date"]) == len("2026-11-25")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "loss.csv"),
        ("NVIDIA H200", "loss_h200.csv"),
        ("NVIDIA A100-SXM4-80GB", "loss_a100_sxm4_80gb.csv"),
        ("cpu", "loss_cpu.csv"),
    ],
)
def test_the_standard_file_holds_rows_of_the_standard_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    monkeypatch.setattr(record, "device_name", lambda _: name)
    assert record.results_file("loss", CPU) == ROOT / "benchmarks" / "results" / file


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = record.time_interleaved(calls, CPU, iterations=3, warmup=1)
    assert "".join(order) == "ab" * 4
    assert [len(samples[name]) for name in "ab"] == [3, 3]
    assert min(samples["a"] + samples["b"]) >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_and_time_on_a_gpu() -> None:
    device = torch.device("cuda")

    def call() -> torch.Tensor:
        scratch = torch.ones(50_000_000, device=device)
        return scratch[:25_000_000].clone()

    call()
    assert record.extra_gigabytes(call, device) == pytest.approx(0.3, abs=0.005)
    samples = record.time_interleaved({"a": call, "b": call}, device, iterations=5)
    assert all(0 < value < 100 for value in samples["a"] + samples["b"])
