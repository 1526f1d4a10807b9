"""What several processes share out beside masters and moments: the same run under every sharding, and what is where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import EVERYTHING, FP64_RUN, RATES, contents, launch, recipe_of, require_alike, strike
from sharded import CASES

SHARDED = Path(__file__).with_name("sharded.py")


def taken(world: Path, folder: Path, *cases: str) -> list[dict[str, dict[str, Any]]]:
    """What two processes came to in each case, by process."""
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", SHARDED, world / "rows.jsonl", folder]
    path = os.pathsep.join(sys.path)  # ``toy_run``
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, dict[str, Any]]] = json.loads(done.stdout)
    return found


def require_same_bits(both: list[dict[str, dict[str, Any]]], case: str, other: str) -> None:
    for of_process in both:
        assert of_process[case]["losses"] == of_process[other]["losses"], case
        assert of_process[case]["state"] == of_process[other]["state"], case


FAULTS = [
    (*place, fault) for fault in ("kill", "nan", "nan_gradient", "out_of_memory", "crash") for place in ((2, 1), (4, 0))
]
whole_soak = pytest.mark.skipif("GRACE_FAULTS" in os.environ, reason="GRACE_FAULTS asks for a part of the soak")
"""CI has no time for all."""


def test_one_micro_batch_a_process_gives_the_same_bits_and_layers_come_and_go(world: Path, tmp_path: Path) -> None:
    cases = ("optimizer", "gradients", "everything", "kept", "resumed", "two", "two gradients", "codes", "restored")
    both = taken(world, tmp_path, *cases)
    for case in ("gradients", "everything", "kept"):
        require_same_bits(both, case, "optimizer")
    for of_process in both:
        assert of_process["restored"]["restored"]
        require_codes(of_process, "codes", "optimizer")
        # Words and norms stay; of the layers' 3.1 MB of FP32 leaves (BF16 on a GPU) codes are an eighth.
        saved = of_process["optimizer"]["sent bytes"] - of_process["codes"]["sent bytes"]
        assert saved == 3 * 4 * 196_608 // 2 * (4 - 1 / 2 - 2 / 128)
        assert of_process["resumed"]["state"] == of_process["kept"]["state"]
        plain, gradients, shared = (of_process[case] for case in ("optimizer", "gradients", "everything"))
        assert all(plain["student here"])
        assert all(gradients["student here"])
        assert not any(shared["student here"])
        assert not any(shared["teacher here"])
        assert shared["most layers"] == 2, "the one that computes and the next"
        # Toy: 4 layers of 196,608 elements in matrices.
        assert plain["sum elements"] - gradients["sum elements"] == 4 * 196_608 // 2
        assert shared["sum elements"] == gradients["sum elements"]
        assert shared["sent bytes"] > gradients["sent bytes"] == plain["sent bytes"]
        assert of_process["two gradients"]["sent bytes"] > of_process["two"]["sent bytes"]
        for case in of_process.values():
            assert case["dtypes"] == ["torch.float32"], "masters, scales and moments"
        # Two micro-batches a process are added up in another order: not the same bits, the same numbers.
        assert of_process["two"]["losses"] == pytest.approx(of_process["two gradients"]["losses"], rel=1e-6)
        assert of_process["two"]["masters"] == pytest.approx(of_process["two gradients"]["masters"], rel=1e-6)


def require_codes(of_process: dict[str, dict[str, Any]], case: str, other: str) -> None:
    """Every leaf is the same bytes on every process, whatever went between them."""
    for key in ("leaves", "state", "losses"):
        assert of_process[case][key] == of_process[other][key], case
    assert of_process[case]["sent bytes"] < of_process[other]["sent bytes"]


@pytest.mark.soak
@whole_soak
def test_recomputed_compiled_packed_and_fp8_layers_come_and_go_too(world: Path, tmp_path: Path) -> None:
    both = taken(world, tmp_path, *CASES)
    for case, other in (
        *((case, "optimizer") for case in ("parameters", "teacher", "recomputed", "compiled", "compiled parameters")),
        ("fp8 sharded", "fp8"),
        ("packed parameters", "packed"),
        ("two parameters", "two gradients"),
        ("bf16 parameters", "bf16"),
    ):
        require_same_bits(both, case, other)
    for scheme in ("w8g32", "w3g64"):
        for of_process in both:
            require_codes(of_process, f"{scheme} codes", f"{scheme} weights")
            assert of_process[f"{scheme} codes"]["leaves"] == both[0][f"{scheme} codes"]["leaves"]
    assert all(of_process["optimizer"]["state"] != of_process["fp8"]["state"] for of_process in both)
    assert not any(flag for of_process in both for flag in of_process["fp8 sharded"]["teacher here"])


@pytest.mark.soak
@whole_soak
@pytest.mark.parametrize(("fp64", "bound"), [(True, 1e-12), (False, 2e-6)])
def test_any_number_of_processes_makes_the_same_run_under_any_sharding(
    world: Path, tmp_path: Path, fp64: bool, bound: float
) -> None:
    settings = {**FP64_RUN, **({} if fp64 else RATES)}
    assert launch(1, recipe_of(world, tmp_path, **settings), tmp_path / "one", fp64=fp64).code == 0
    for count in (1, 2, 4):
        for sharding in ("gradients", "parameters"):
            out = tmp_path / f"{sharding}-{count}"
            recipe = recipe_of(world, tmp_path, **settings, runtime__sharding=sharding)
            ended = launch(count, recipe, out, fp64=fp64)
            assert ended.code == 0, ended.said
            require_alike(tmp_path / "one", out, 49, bound)


@pytest.mark.soak
@whole_soak
@pytest.mark.parametrize("count", [2, 4])
def test_final_has_the_same_bytes_under_any_sharding(world: Path, tmp_path: Path, count: int) -> None:
    """A process with one micro-batch a step adds up in the same order whatever is shared out. BF16 layers, too, which
    are gathered to be written."""
    for scheme in ({}, {"method": "kd", "scheme": "bf16"}):
        folders = []
        for sharding in ("optimizer", "gradients", "parameters"):
            folders.append(tmp_path / f"{sharding}{len(scheme)}")
            settings: dict[str, Any] = {**scheme, "optim__num_steps": 6, "runtime__checkpoint_every_steps": 0}
            settings |= {"data__accumulation": count, "runtime__sharding": sharding}
            assert launch(count, recipe_of(world, tmp_path, **settings), folders[-1]).code == 0
        first, *others = (contents(folder / "final") for folder in folders)
        assert any(name.startswith("grid/") for name in first) == (not scheme)
        for other in others:
            assert other == first


@pytest.mark.soak
@whole_soak
@pytest.mark.parametrize("count", [2, 4])
def test_a_sharded_run_that_was_stopped_ends_with_the_same_bytes(world: Path, tmp_path: Path, count: int) -> None:
    settings = {"optim__num_steps": 8, "runtime__checkpoint_every_steps": 4, **EVERYTHING}
    recipe = recipe_of(world, tmp_path, **settings)
    assert launch(count, recipe, tmp_path / "whole").code == 0
    stopped = launch(count, recipe, tmp_path / "run", plant=("term", 1, 3))
    assert "stopped by SIGTERM" in stopped.reasons[0]
    resumed = launch(count, recipe, tmp_path / "run", "--resume")
    assert resumed.said.count("resumed from step-000006") == 1, resumed.said
    assert "not bit-exact" not in resumed.said
    assert contents(tmp_path / "run" / "final") == contents(tmp_path / "whole" / "final")


@pytest.mark.soak
@whole_soak
@pytest.mark.parametrize("sharding", ["gradients", "parameters"])
def test_a_sharded_checkpoint_goes_to_another_number_of_processes(world: Path, tmp_path: Path, sharding: str) -> None:
    settings = {"optim__num_steps": 8, "runtime__checkpoint_every_steps": 4, "runtime__sharding": sharding}
    recipe = recipe_of(world, tmp_path, **settings)
    assert launch(1, recipe, tmp_path / "whole", fp64=True).code == 0
    assert launch(4, recipe, tmp_path / "run", plant=("term", 0, 2), fp64=True).code != 0
    resumed = launch(2, recipe, tmp_path / "run", "--resume", fp64=True)
    assert resumed.code == 0, resumed.said
    assert "which 4 processes wrote and 2 read: not bit-exact" in resumed.said
    require_alike(tmp_path / "whole", tmp_path / "run", 4, 1e-12)


@pytest.mark.soak
@pytest.mark.parametrize(("count", "victim", "fault"), FAULTS[:1] if "GRACE_FAULTS" in os.environ else FAULTS)
def test_a_fault_ends_all_that_wait_between_layers(
    world: Path, tmp_path: Path, fault: str, count: int, victim: int
) -> None:
    strike(world, tmp_path, fault, count, victim, 5, **EVERYTHING)
