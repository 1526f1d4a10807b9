"""bench_teacher_divergence.py on small tensors: what it calls a divergence, and what it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_teacher_divergence as bench  # noqa: E402
import record  # noqa: E402


def made(seed: int = 0, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(states, states nearby, head); more tokens than a chunk, and no multiple of it."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, 16, generator=generator)
    other = states + 0.05 * torch.randn(tokens, 16, generator=generator)
    return states, other, torch.randn(50, 16, generator=generator)


def test_it_is_the_divergence_of_torch() -> None:
    ours, theirs, head = made()
    found = bench.divergence(ours, theirs, head)
    for temperature in (1, 2):
        p, q = ((part @ head.T).double() / temperature for part in (ours, theirs))
        expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        assert torch.allclose(found.kl[temperature], expected, rtol=1e-9, atol=1e-12)
    entropy = [torch.distributions.Categorical(logits=(x @ head.T).double()).entropy() for x in (ours, theirs)]
    gates = [torch.exp(-e / torch.log(torch.tensor(50.0, dtype=torch.float64))) for e in entropy]
    assert torch.allclose(found.gate, (gates[0] - gates[1]).abs(), rtol=0, atol=1e-12)
    assert torch.equal(found.top1, (ours @ head.T).argmax(-1) == (theirs @ head.T).argmax(-1))


def test_the_teacher_itself_is_at_no_distance() -> None:
    ours, _, head = made()
    found = bench.divergence(ours, ours.clone(), head)
    assert float(found.kl[1].abs().max()) == 0
    assert float(found.gate.max()) == 0
    assert bool(found.top1.all())


def test_a_coarser_store_is_farther() -> None:
    ours, _, head = made()
    near, far = (
        float(bench.divergence(ours, stored(ours), head).kl[1].mean())
        for stored in (bench.stored_bf16, bench.stored_fp8)
    )
    assert 0 < near < far / 20


def test_rows_are_of_the_schema_and_written_in_place(tmp_path: Path) -> None:
    ours, theirs, head = made(tokens=40)
    rows = bench.compare("smollm2_135m", [ours, theirs], {"fp8_linears": [theirs, theirs]}, head)
    out = tmp_path / "found.csv"
    for _ in range(2):
        record.write_rows(out, rows)
    assert record.read_rows(out) == rows
    metrics = ("kl_t1", "kl_t1_mean", "kl_t2", "kl_t2_mean", "gate_difference", "top1")
    impls = ("fp8_linears", "bf16_stored", "fp8_stored")
    assert [(row["impl"], row["metric"]) for row in rows] == [(i, m) for i in impls for m in metrics]
    assert {row["device"] for row in rows} == {"cpu"}


def test_what_is_not_finite_is_not_written() -> None:
    ours, theirs, head = made(tokens=8)
    theirs[3] = float("nan")
    with pytest.raises(ValueError, match="smollm2_135m fp8_linears: kl_t1 is not finite"):
        bench.compare("smollm2_135m", [ours], {"fp8_linears": [theirs]}, head)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("text",), "text needs --gguf FILE"),
        (("toy", "--rows", "nowhere.jsonl"), "nowhere.jsonl is no file; toy needs --rows FILE"),
    ],
)
def test_a_file_that_is_missing(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {line}")


def test_the_standard_file_holds_every_cell_of_the_table() -> None:
    rows = record.read_rows(bench.OUT)
    lines = bench.table(rows).splitlines()
    assert len(lines) == 2 + len(bench.CASES) * len(bench.SAYS) + 2
    assert {row["unit"] for row in rows} == {"nats", "1", "share"}
