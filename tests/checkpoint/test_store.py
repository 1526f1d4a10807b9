"""Exact resume: round trips, kills, rot, retention."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import assert_same_state, fail_at, in_child, leftovers, make_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from grace_vlm.checkpoint import (
    TrainState,
    find_checkpoint,
    is_complete,
    load_checkpoint,
    require_same,
    save_checkpoint,
    sweep_partials,
    verify_manifest,
    write_manifest,
)
from grace_vlm.checkpoint.store import JSON_FIELDS, TENSOR_FIELDS, list_checkpoints
from grace_vlm.errors import CheckpointError


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, make_state(12), keep=1)
    assert path == tmp_path / "step-000012"
    assert_same_state(load_checkpoint(path), make_state(12))
    assert sorted(os.listdir(path)) == sorted(
        [*(f"{name}.safetensors" for name in TENSOR_FIELDS), "state.json", "manifest.json", "manifest.sha256"]
    )


def test_every_field_is_stored() -> None:
    assert sorted([*TENSOR_FIELDS, *JSON_FIELDS]) == sorted(f.name for f in dataclasses.fields(TrainState))
    assert TENSOR_FIELDS == ("masters", "log_scales", "optimizer_tensors")


@pytest.mark.parametrize("name", [*TENSOR_FIELDS, *JSON_FIELDS])
def test_every_field_comes_back(tmp_path: Path, name: str) -> None:
    """A field that was saved with another value is loaded with that value, and only that one differs."""
    value: Any = getattr(make_state(99), name)
    step = value if name == "step" else 12
    path = save_checkpoint(tmp_path, step, dataclasses.replace(make_state(12), **{name: value}), keep=1)
    found = load_checkpoint(path)
    assert_same_state(found, dataclasses.replace(make_state(12), **{name: value}))
    with pytest.raises(AssertionError):
        assert_same_state(found, make_state(12))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.floats(allow_nan=False, allow_infinity=False), integer=st.integers())
@pytest.mark.usefixtures("no_fsync")
def test_numbers_are_exact(tmp_path: Path, number: float, integer: int) -> None:
    state = dataclasses.replace(make_state(1), adaptive_weight={"number": number, "integer": integer})
    found = load_checkpoint(save_checkpoint(tmp_path, 1, state, keep=1)).adaptive_weight
    assert (found["number"].hex(), found["integer"]) == (number.hex(), integer)


@pytest.mark.parametrize("value", [{1: 2}, {"a": (1, 2)}, {"a": {"b": {2: 3}}}])
def test_what_json_would_change_is_a_bug_of_the_caller(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="integer keys, tuples"):
        save_checkpoint(tmp_path, 1, dataclasses.replace(make_state(1), sampler=value), keep=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(tmp_path, 1, dataclasses.replace(make_state(1), sampler={"a": float("inf")}), keep=1)
    assert os.listdir(tmp_path) == []


def test_odd_tensors_survive(tmp_path: Path) -> None:
    """Views, transposes, scalars, empty, every dtype that a run keeps."""
    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "view": base[4:12],
        "other view of it": base[12:20],
        "transposed": base.reshape(4, 6).T,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "int64": torch.tensor([2**62]),
        "uint8": torch.tensor([255], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]).to(torch.bfloat16),
        "grad": torch.ones(2, requires_grad=True),
    }
    state = dataclasses.replace(make_state(3), masters=tensors, log_scales={})
    found = load_checkpoint(save_checkpoint(tmp_path, 3, state, keep=1))
    assert found.log_scales == {}
    for name, tensor in tensors.items():
        assert found.masters[name].dtype == tensor.dtype, name
        stored, given_bytes = (
            t.detach().contiguous().view(-1).view(torch.uint8) for t in (found.masters[name], tensor)
        )
        assert torch.equal(stored, given_bytes), name


def rewrite(path: Path, **changes: Any) -> None:
    """Change state.json and seal the folder again, as another version of the program would have."""
    content = json.loads((path / "state.json").read_text())
    content.update(changes)
    (path / "state.json").write_text(json.dumps({key: value for key, value in content.items() if value != "drop"}))
    write_manifest(path)


@pytest.mark.parametrize("name", [*TENSOR_FIELDS, *JSON_FIELDS])
def test_a_missing_field_is_listed(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, 3, make_state(3), keep=1)
    if name in TENSOR_FIELDS:
        (path / f"{name}.safetensors").unlink()
    rewrite(path, **({name: "drop"} if name in JSON_FIELDS else {}))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    missing = f"{name}.safetensors" if name in TENSOR_FIELDS else name
    assert str(caught.value) == (
        f"{path} does not fit this version of grace: missing ['{missing}'], unknown nothing; "
        "use the version that wrote it"
    )


def test_an_unknown_field_or_version_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, make_state(3), keep=1)
    rewrite(path, ema=1)
    with pytest.raises(CheckpointError, match=r"missing nothing, unknown \['ema'\]"):
        load_checkpoint(path)
    rewrite(path, ema="drop", format_version=1)
    with pytest.raises(CheckpointError, match="has format_version 1; this grace reads 2"):
        load_checkpoint(path)
    rewrite(path, format_version=2, num_processes=0)
    with pytest.raises(CheckpointError, match="says it is of 0 processes; it is damaged"):
        load_checkpoint(path)
    rewrite(path, num_processes=1, step=[3])
    with pytest.raises(CheckpointError, match=r"state\.json holds a list as 'step'"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_checkpoint(tmp_path / "step-000004")


def test_forty_kills_of_a_continuous_writer(tmp_path: Path) -> None:
    """SIGKILL at random instants of a process that does nothing but save; each time one sound checkpoint is found."""
    generator = random.Random(7)
    step, num_inside = 1, 0
    states = [make_state(k, size=65_536) for k in range(400)]
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            try:
                for k in range(step, 400):
                    save_checkpoint(tmp_path, k, states[k], keep=2)
            finally:
                os._exit(0)
        while step == 1 and find_checkpoint(tmp_path)[0] is None:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.002, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        num_inside += bool(leftovers(tmp_path))
        sweep_partials(tmp_path)
        assert leftovers(tmp_path) == []
        path, skipped = find_checkpoint(tmp_path)
        assert path is not None
        assert skipped == []
        found = load_checkpoint(path)
        assert found.step >= step - 1
        assert_same_state(found, states[found.step])
        step = found.step + 1
    assert num_inside >= 12


@pytest.mark.parametrize("failure", [0, errno.EIO])
@pytest.mark.parametrize("second", [5, 10])
def test_every_step_of_a_save_may_fail(tmp_path: Path, failure: int, second: int) -> None:
    """Saving step 10 over step 5 with keep=1, and saving step 5 again: one sound checkpoint at each of the failures."""
    statuses: list[int] = []
    while 2 not in statuses:
        k = len(statuses) + 1
        root = tmp_path / f"{k}"
        save_checkpoint(root, 5, make_state(5), keep=1)

        def work(k: int = k, root: Path = root) -> int:
            reached = fail_at(k, root, failure)
            try:
                save_checkpoint(root, second, make_state(second), keep=1)
            except CheckpointError:
                return 1
            return 0 if reached() else 2

        statuses.append(in_child(work))
        sweep_partials(root)
        path, skipped = find_checkpoint(root)
        assert path is not None
        assert skipped == []
        found = load_checkpoint(path)
        assert_same_state(found, make_state(found.step))
        assert found.step == second or statuses[-1] != 0
        assert leftovers(root) == []
    assert set(statuses) <= ({9, 2} if failure == 0 else {0, 1, 2})
    assert len(statuses) > 40


def test_ten_thousand_bit_flips_are_all_detected(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, make_state(5), keep=1)
    files = sorted(path.iterdir())
    sizes = [file.stat().st_size for file in files]
    generator = random.Random(11)
    undetected = []
    for file in generator.choices(files, weights=sizes, k=10_000):
        position, bit = generator.randrange(file.stat().st_size), generator.randrange(8)
        with file.open("r+b", buffering=0) as stream:
            stream.seek(position)
            (byte,) = stream.read(1)
            stream.seek(position)
            stream.write(bytes([byte ^ (1 << bit)]))
            try:
                verify_manifest(path)
                undetected.append((file.name, position, bit))
            except CheckpointError as error:
                if len(str(error).splitlines()) != 1:
                    undetected.append((str(error), position, bit))
            stream.seek(position)
            stream.write(bytes([byte]))
    assert undetected == []
    verify_manifest(path)


def damage(path: Path, kind: str) -> str:
    """Break a checkpoint; returns what the reason must say."""
    weights, manifest = path / "masters.safetensors", path / "manifest.json"
    if kind == "bit":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 16
        weights.write_bytes(content)
        return "masters.safetensors is corrupt: sha256 is"
    if kind == "truncated":
        os.truncate(weights, 17)
        return "masters.safetensors has 17 bytes, its manifest says"
    if kind == "missing":
        weights.unlink()
        return "lacks masters.safetensors, which its manifest lists"
    if kind == "extra":
        (path / "notes.txt").write_text("x")
        return "holds notes.txt, which its manifest does not list"
    if kind == "manifest":
        manifest.write_text(manifest.read_text().replace('"bytes": ', '"bytes":  '))
        return "manifest.json is corrupt: sha256 is"
    (path / "manifest.sha256").unlink()
    return "has no manifest.sha256: it was never completely written"


KINDS = ["bit", "truncated", "missing", "extra", "manifest", "marker"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_is_skipped_with_its_reason(tmp_path: Path, kind: str) -> None:
    older, newer = (save_checkpoint(tmp_path, k, make_state(k), keep=2) for k in (5, 10))
    reason = damage(newer, kind)
    path, skipped = find_checkpoint(tmp_path)
    assert path == older
    assert [folder for folder, _ in skipped] == [newer]
    assert reason in skipped[0][1]
    assert "\n" not in skipped[0][1]
    with pytest.raises(CheckpointError, match=reason.replace(".", r"\.")):
        load_checkpoint(newer)
    if kind == "bit":
        assert len(load_file(newer / "masters.safetensors")) == 2  # safetensors itself sees nothing
    # The run goes on from the older one and saves the same step again.
    save_checkpoint(tmp_path, 10, make_state(10), keep=2)
    assert find_checkpoint(tmp_path) == (newer, [])
    assert_same_state(load_checkpoint(newer), make_state(10))


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])
    assert find_checkpoint(tmp_path / "missing") == (None, [])
    damage(save_checkpoint(tmp_path, 1, make_state(1), keep=1), "marker")
    path, skipped = find_checkpoint(tmp_path)
    assert path is None
    assert len(skipped) == 1


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, make_state(step), keep=3)
    (tmp_path / "step-best").mkdir()
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-1000000"
    assert [step for step, _ in list_checkpoints(tmp_path)] == [999_999, 1_000_000]


EVENTS = st.lists(
    st.one_of(
        st.just(("save",)),
        st.just(("killed",)),
        st.tuples(st.just("damage"), st.sampled_from(KINDS)),
        st.just(("delete",)),
        st.just(("resume",)),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, keep=st.integers(1, 4))
@pytest.mark.usefixtures("no_fsync")
def test_retention(tmp_path: Path, events: list[tuple[str, ...]], keep: int) -> None:
    """Whatever happened before: the checkpoint just saved is there, at most ``keep`` up to it, and what is broken
    neither counts nor is touched, unless it is the very step that is saved."""
    root = tmp_path / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    step = 0
    for event in events:
        complete = [path for _, path in list_checkpoints(root) if is_complete(path)]
        broken = {path for _, path in list_checkpoints(root)} - set(complete)
        if event[0] == "save":
            step += 1
            path = save_checkpoint(root, step, make_state(step, size=8), keep)
            assert_same_state(load_checkpoint(path), make_state(step, size=8))
            now = [number for number, path in list_checkpoints(root) if number <= step and is_complete(path)]
            earlier = [number for number, p in list_checkpoints(root) if p in complete and number < step]
            assert now[-1] == step
            assert len(now) <= keep
            assert len(now) >= min(keep, 1 + len(earlier))
            assert all(path.is_dir() for path in broken)
        elif event[0] == "killed":
            (root / f".partial-step-{step + 1:06d}-1").mkdir(parents=True, exist_ok=True)
        elif event[0] == "damage" and complete:
            damage(complete[-1], event[1])
        elif event[0] == "delete" and complete:
            shutil.rmtree(complete[0])
        elif event[0] == "resume":
            path, skipped = find_checkpoint(root)
            step = load_checkpoint(path).step if path else 0
            assert all(folder != path for folder, _ in skipped)


def test_retention_deletes_the_oldest(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, make_state(step), keep=3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5, 6, 7]
    # A run resumed from step 5 must neither lose what it saves nor delete what is later.
    save_checkpoint(tmp_path, 6, make_state(6), keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 7]


def test_a_save_that_fails_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, make_state(1), keep=1)

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file({"half": torch.zeros(3)}, path)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("grace_vlm.checkpoint.store.save_file", full)
    with pytest.raises(CheckpointError, match=r"step-000002: the disk is full \([0-9,]+ bytes needed\)"):
        save_checkpoint(tmp_path, 2, make_state(2), keep=1)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert find_checkpoint(tmp_path) == (tmp_path / "step-000001", [])


def test_require_same() -> None:
    run = Path("runs/mine")
    require_same({"a": 1, "b": None}, {"b": None, "a": 1}, run)
    own, found = {"dtype": "bf16", "world_size": 1, "device": "cpu"}, {"dtype": "fp32", "world_size": 1, "seed": 3}
    with pytest.raises(CheckpointError) as caught:
        require_same(own, found, run)
    assert str(caught.value) == (
        "runs/mine was begun otherwise (device: absent then, cpu now; dtype: fp32 then, bf16 now; "
        "seed: 3 then, absent now); restore this, or remove that folder"
    )
    with pytest.raises(CheckpointError, match=r"restore this \(num_threads: by OMP_NUM_THREADS\), or remove"):
        require_same({"num_threads": 1}, {"num_threads": 2}, run)


def test_programmers_errors(tmp_path: Path) -> None:
    for step, keep in ((1, 0), (2, 1)):
        with pytest.raises(ValueError, match="keep"):
            save_checkpoint(tmp_path, step, make_state(1), keep=keep)
