"""What a disk, a kill or another recipe does to a cache: found, said in one line, or mended by running it again."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_teacher_cache import cached, recipe
from toy_run import write_models, write_rows

from grace_vlm.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from grace_vlm.formats.publish import publish_model
from grace_vlm.models.toy import build_toy_model, build_toy_processor
from grace_vlm.train import cache_shards
from grace_vlm.train.cache_build import build_cache, verify_cache
from grace_vlm.train.cache_shards import EntryStore, list_shards
from grace_vlm.train.config import Recipe
from grace_vlm.train.loop import Run
from grace_vlm.train.teacher import OnlineTeacher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_rows(folder)
    write_models(folder)
    build_cache(recipe(folder), folder / "cache")
    return folder


@pytest.fixture
def cache(world: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(world / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def contents(cache: Path) -> dict[bytes, list[bytes]]:
    """Every entry's bytes by its key."""
    store = EntryStore(cache)
    keys = [key for shard in store.shards for key in shard.row_keys()]
    return {key: [cache_shards.raw(part).numpy().tobytes() for part in store.read(key).payloads()] for key in keys}


def one_step(made: Recipe, out: Path) -> None:
    run = Run(made, out)
    run.stepper.run(0, [run.loader.next() for _ in range(12)])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_teacher_cache import recipe
from grace_vlm.train import cache_build, cache_shards
cache_shards.SHARD_BYTES, cache_build.WINDOW_ROWS = 4000, 2
folder = Path(sys.argv[1])
published = cache_shards._publish
def dies(where, entries, num_bytes):
    if where.name == "shard-000003":
        (where.parent / f".partial-{where.name}-{os.getpid()}").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    published(where, entries, num_bytes)
cache_shards._publish = dies
cache_build.build_cache(recipe(folder), folder / "killed")
"""


def test_a_build_that_was_killed_goes_on(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL inside the fourth shard: three are there, the rest is made by the next run, leftovers are swept."""
    tests = Path(__file__).parents[1]
    words = [sys.executable, "-c", KILLED, str(world), str(tests / "train"), str(tests / "faults")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    killed = world / "killed"
    assert len(list_shards(killed)) == 3
    assert list((killed / "shards").glob(".partial-*"))
    num_before = len(EntryStore(killed))
    assert 0 < num_before < 24
    said: list[str] = []
    report = build_cache(recipe(world), killed, notify=said.append)
    assert (report.num_entries, report.num_new) == (24, 24 - num_before)
    assert len(said) == 1
    assert re.fullmatch(r"removed \.partial-shard-000003-\d+, left by an interrupted write", said[0])
    assert not list((killed / "shards").glob(".*"))
    assert contents(killed).keys() == contents(world / "cache").keys()
    verify_cache(killed)


def test_an_error_loses_the_open_shard_only(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_shards, "SHARD_BYTES", 4000)
    monkeypatch.setattr("grace_vlm.train.cache_build.WINDOW_ROWS", 2)

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(recipe(world), tmp_path / "cache", progress=stop)
    assert 12 <= len(EntryStore(tmp_path / "cache")) < 20
    assert build_cache(recipe(world), tmp_path / "cache").num_entries == 24


@pytest.mark.parametrize("part", ["hidden", "gate", "grams", "key", "checksum", "image_tokens", "tokens", "pictures"])
def test_a_flipped_bit_is_found_when_its_row_is_read(world: Path, cache: Path, tmp_path: Path, part: str) -> None:
    file = cache / "shards" / "shard-000000" / "entries.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[part]["data_offsets"]
    data[8 + length + (begin + end) // 2 & ~7] ^= 1
    file.write_bytes(bytes(data))
    made = cached(world, cache)
    shard = cache / "shards" / "shard-000000"
    remedy = f"delete {shard} and run grace teacher cache again, which makes its rows anew"
    if part == "key":  # the row under its true key is gone
        with pytest.raises(DataError, match="has no entry of row"):
            one_step(made, tmp_path / "run")
    else:
        with pytest.raises(CheckpointError) as caught:
            one_step(made, tmp_path / "run")
        where = " at the entry of row 'r\\d+'"
        if part in ("image_tokens", "tokens", "pictures"):  # seen when the shard is opened
            where = ": its counts are not those of its values"
        pattern = rf"{re.escape(str(shard))} is corrupt{where}; {re.escape(remedy)}"
        assert re.fullmatch(pattern, str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        verify_cache(cache)
    assert str(caught.value).startswith(f"{file} is corrupt: sha256 is ")
    assert str(caught.value).endswith(f"; {remedy}")
    shutil.rmtree(shard)
    report = build_cache(recipe(world), cache)
    assert (report.num_entries, report.num_new) == (24, 24)
    one_step(made, tmp_path / "again")


def test_a_damaged_head_is_found(world: Path, cache: Path, tmp_path: Path) -> None:
    file = cache / "head" / "head.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 16
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"head\.safetensors is corrupt: sha256 is"):
        Run(cached(world, cache), tmp_path / "run")


def test_a_shard_that_is_not_whole(world: Path, cache: Path, tmp_path: Path) -> None:
    shard = cache / "shards" / "shard-000000"
    (shard / "entries.safetensors").unlink()
    line = (
        f"{shard} is damaged: its files are not those of its manifest; delete {shard} and run grace teacher cache "
        "again, which makes its rows anew"
    )
    for act in (lambda: Run(cached(world, cache), tmp_path / "run"), lambda: build_cache(recipe(world), cache)):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert str(caught.value) == line


def test_a_row_that_the_cache_lacks(world: Path, tmp_path: Path) -> None:
    """Another text, another picture under the same name: another row."""
    for name in ("rows.jsonl", "images"):
        (shutil.copytree if name == "images" else shutil.copy)(world / name, tmp_path / name)
    Image.new("RGB", (128, 128), "red").save(tmp_path / "images" / "7.png")
    made = cached(world, world / "cache", data__train=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError) as caught:
        one_step(made, tmp_path / "run")
    assert str(caught.value) == (
        f"{world / 'cache'} has no entry of row 'r7': the row is new, or its text, its pictures or how they are read "
        f"changed; add what is missing with grace teacher cache RECIPE --out {world / 'cache'}"
    )


def refusal(made: Recipe, out: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Run(made, out)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "differing"),
    [
        ({"loss__relational_layer": -3}, "loss.relational_layer is -3 here and -2 there"),
        ({"data__max_pixels": 200 * 200}, "data.max_pixels is 40000 here and None there"),
        ({"loss__implementation": "official"}, "gate is official here and FP32 there"),
        (
            {"model__teacher": "toy:tiny"},
            rf"weights is toy:tiny of seed 1 on cpu, torch {re.escape(torch.__version__)} here "
            "and [0-9a-f]{16} there",
        ),
    ],
)
def test_a_cache_of_something_else(world: Path, tmp_path: Path, overrides: dict[str, Any], differing: str) -> None:
    made = recipe(world, **{"model__teacher": None, "model__teacher_cache": str(world / "cache"), **overrides})
    whole = (
        rf"{re.escape(str(world / 'cache'))} \(model\.teacher_cache\) is the cache of something else: {differing}; "
        r"change the recipe, or make a cache of it with grace teacher cache RECIPE --out FOLDER"
    )
    assert re.fullmatch(whole, refusal(made, tmp_path / "run"))


def test_what_a_run_does_not_use_may_differ(world: Path, tmp_path: Path) -> None:
    made = cached(world, world / "cache", loss={"relational": False, "relational_layer": -3})
    Run(made, tmp_path / "run")


def test_a_teacher_that_is_named_must_be_the_caches(world: Path, tmp_path: Path) -> None:
    """By its weights where a manifest says them, so that a copy elsewhere is the same teacher; else by its name."""
    shutil.copytree(world / "teacher", tmp_path / "moved")
    Run(
        recipe(world, model__teacher=str(tmp_path / "moved"), model__teacher_cache=str(world / "cache")), tmp_path / "a"
    )
    named = recipe(world, model__teacher=str(world / "student"), model__teacher_cache=str(world / "cache"))
    assert "weights is " in refusal(named, tmp_path / "b")
    named = recipe(world, model__teacher="somebody/else", model__teacher_cache=str(world / "cache"))
    assert f"teacher is somebody/else here and {world / 'teacher'} there" in refusal(named, tmp_path / "c")
    named = recipe(
        world,
        model__teacher=str(world / "teacher"),
        model__teacher_precision="fp8",
        model__teacher_cache=str(world / "cache"),
    )
    assert "model.teacher_precision is fp8 here and bf16 there" in refusal(named, tmp_path / "d")


def test_a_student_of_other_tokens(world: Path, tmp_path: Path) -> None:
    processor = build_toy_processor(["entirely other words, of course"] * 3, vocab_size=310)
    publish_model(tmp_path / "student", build_toy_model("tiny", processor, 1), processor, {}, (), "# other\n")
    made = cached(world, world / "cache", model__student=str(tmp_path / "student"))
    assert re.search(r"tokens is [0-9a-f]{16} here and [0-9a-f]{16} there", refusal(made, tmp_path / "run"))


def test_a_build_does_not_go_on_with_another_cache(world: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_cache(recipe(world), cache, "fp8")
    assert str(caught.value) == (
        f"{cache} is a cache of something else: --hidden is fp8 here and exact there; choose another --out, "
        "or delete it"
    )
    with pytest.raises(ConfigError, match=r"model\.teacher_precision is fp8 here and bf16 there"):
        build_cache(recipe(world, model__teacher_precision="fp8"), cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError) as caught_too:
        build_cache(recipe(world), tmp_path / "mine")
    assert str(caught_too.value) == (
        f"{tmp_path / 'mine'} exists and is no cache of a teacher (no cache.json); choose another --out"
    )
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_no_cache_at_all(world: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Run(cached(world, tmp_path / "nothing"), tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path / 'nothing'} is no cache of a teacher (no cache.json); make it with grace teacher cache RECIPE "
        f"--out {tmp_path / 'nothing'}"
    )


def test_too_many_bad_rows_stop_a_build_and_leave_what_was_made(world: Path, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "images"):
        (shutil.copytree if name == "images" else shutil.copy)(world / name, tmp_path / name)
    (tmp_path / "images" / "20.png").unlink()
    made = recipe(world, data__train=str(tmp_path / "rows.jsonl"), data__max_bad_fraction=0)
    with pytest.raises(DataError, match=r"row 20 \('r20'\) is bad, image_missing"):
        build_cache(made, tmp_path / "cache")
    made = recipe(world, data__train=str(tmp_path / "rows.jsonl"), data__max_bad_fraction=0.1)
    report = build_cache(made, tmp_path / "cache")
    assert (report.num_bad, report.num_entries) == (1, 23)


def test_a_teacher_that_is_not_finite_is_not_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OnlineTeacher.signal

    def poisoned(self: OnlineTeacher, batch: Any) -> Any:
        found = whole(self, batch)
        found.hidden[-1, 3] = float("nan")
        return found

    monkeypatch.setattr(OnlineTeacher, "signal", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        build_cache(recipe(world), tmp_path / "cache")
    assert re.fullmatch(
        r"what the teacher says about row 'r\d+' is not finite; repair the row or leave it out, then run the same "
        "command again",
        str(caught.value),
    )
    assert not list_shards(tmp_path / "cache")


def test_a_disk_without_room(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in a line, from the thread that publishes; what was published before stays."""
    monkeypatch.setattr(cache_shards, "SHARD_BYTES", 4000)
    monkeypatch.setattr("grace_vlm.train.cache_build.WINDOW_ROWS", 2)
    usage, room = shutil.disk_usage, [3]

    def shrinking(path: Any) -> Any:
        room[0] -= "shards" in str(path)
        return usage(path) if room[0] >= 0 else shutil._ntuple_diskusage(0, 0, 0)

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    with pytest.raises(
        CheckpointError, match=r"shard-00000\d: [0-9,]+ bytes needed, 0 free; make room or write elsewhe"
    ):
        build_cache(recipe(world), tmp_path / "cache")
    assert 1 <= len(list_shards(tmp_path / "cache")) <= 3
    monkeypatch.undo()
    assert build_cache(recipe(world), tmp_path / "cache").num_entries == 24
