"""Publish or nothing: what is left after an error, a full disk, a kill."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_states import fail_at, in_child, leftovers
from safetensors.torch import save_file

from grace_vlm.checkpoint import (
    is_complete,
    publish_folder,
    require_free_space,
    sweep_partials,
    verify_manifest,
    write_json_atomic,
)
from grace_vlm.errors import CheckpointError


def publish(final: Path, text: str, overwrite: bool = False) -> None:
    with publish_folder(final, overwrite=overwrite) as stage:
        (stage / "grid").mkdir()
        (stage / "grid" / "plan.json").write_text(text)
        save_file({"a": torch.arange(4)}, stage / "model.safetensors")


def content(final: Path) -> str:
    verify_manifest(final)
    return (final / "grid" / "plan.json").read_text()


def test_publishes_a_verified_folder_and_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path / "deep" / "out", "one")
    assert content(tmp_path / "deep" / "out") == "one"
    assert os.listdir(tmp_path / "deep") == ["out"]
    files = json.loads((tmp_path / "deep" / "out" / "manifest.json").read_text())["files"]
    assert sorted(files) == ["grid/plan.json", "model.safetensors"]


def test_manifest_is_readable_by_sha256sum(tmp_path: Path) -> None:
    publish(tmp_path / "out", "one")
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=tmp_path / "out", check=True)


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_and_no_stage(tmp_path: Path, error: BaseException) -> None:
    publish(tmp_path / "out", "old")

    def interrupted() -> None:
        with publish_folder(tmp_path / "out", overwrite=True) as stage:
            (stage / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert content(tmp_path / "out") == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_refuses_an_existing_target_before_any_work(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with (
        pytest.raises(CheckpointError, match=r"^/.*/out already exists; choose another path or pass --overwrite$"),
        publish_folder(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")


def test_overwrite_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    publish(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_never_deletes_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("x")
    with pytest.raises(CheckpointError, match="was not published by grace") as caught:
        publish(tmp_path / "photos", "new", overwrite=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "photos" / "1.jpg").read_text() == "x"
    (tmp_path / "empty").mkdir()
    publish(tmp_path / "empty", "new", overwrite=True)
    assert content(tmp_path / "empty") == "new"


def test_a_file_or_link_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="exists and is not a folder"):
            publish(tmp_path / name, "new", overwrite=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*: a part of the path is a file"):
        publish(tmp_path / "file" / "out", "new")


def test_a_symlink_inside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a plain file"), publish_folder(tmp_path / "out") as stage:
        (stage / "weights").symlink_to("/etc/hostname")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    os.umask(mask)
    publish(tmp_path / "out", "one")
    for path in (tmp_path / "out").rglob("*"):
        expected = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == expected & ~mask, path


def test_free_space_is_checked_first(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(
        CheckpointError,
        match=r"^cannot write /.*/out: 1,152,921,504,606,846,976 bytes needed, [0-9,]+ free; make room",
    ):
        require_free_space(tmp_path / "out", 1 << 60)
    with (
        pytest.raises(CheckpointError, match="bytes needed"),
        publish_folder(tmp_path / "out", needed_bytes=1 << 60),
    ):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_file_size_limit_is_one_line_and_the_old_stays(tmp_path: Path, writer: str) -> None:
    """RLIMIT_FSIZE stands in for a full disk where nobody is root; both writers meet it."""
    final = tmp_path / "out"
    publish(final, "old")

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            with publish_folder(final, overwrite=True, needed_bytes=40_000) as stage:
                if writer == "python":
                    (stage / "big").write_bytes(b"x" * 40_000)
                else:
                    save_file({"big": torch.zeros(10_000)}, stage / "big.safetensors")
        except CheckpointError as error:
            expected = (
                f"cannot write {final}: a file is larger than this process may write (40,000 bytes needed); "
                "what was there before is untouched"
            )
            return 0 if str(error) == expected else 3
        return 4

    assert in_child(work) == 0
    assert content(final) == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root; RLIMIT_FSIZE covers the same path")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("num_kib", [200, 220, 240, 248, 252, 300, 1000])
def test_a_really_full_disk(tiny_disk: Path, num_kib: int) -> None:
    """Wherever the room ends (payload, manifest), the old is intact and the line names the path."""
    publish(tiny_disk / "out", "old")

    def fill() -> None:
        with publish_folder(tiny_disk / "out", overwrite=True) as stage:
            (stage / "a").write_bytes(b"x" * (num_kib << 10))
            save_file({"b": torch.zeros(1000 if num_kib > 220 else 20_000)}, stage / "b.safetensors")
            (stage / "c").write_bytes(b"x" * 8192)

    with pytest.raises(CheckpointError, match=r"^cannot write .*/disk/out: the disk is full; what was there") as caught:
        fill()
    assert "\n" not in str(caught.value)
    assert content(tiny_disk / "out") == "old"
    assert os.listdir(tiny_disk) == ["out"]


def test_a_read_only_disk(tiny_disk: Path) -> None:
    publish(tiny_disk / "out", "old")
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(CheckpointError, match="the file system is read-only"):
        publish(tiny_disk / "other", "new")
    assert content(tiny_disk / "out") == "old"


def test_an_unreadable_source_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), publish_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "elsewhere" / "source"))


def test_eio_of_the_parents_fsync_keeps_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename happened, its durability is unknown: say so, keep the old one aside."""
    publish(tmp_path / "out", "old")
    real, parent = os.fsync, os.stat(tmp_path)

    def fsync(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), parent):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"out is written, but the disk does not confirm that it will last"):
        publish(tmp_path / "out", "new", overwrite=True)
    monkeypatch.undo()
    assert content(tmp_path / "out") == "new"
    assert content(tmp_path / f".replaced-out-{os.getpid()}") == "old"
    assert [path.name for path in sweep_partials(tmp_path)] == [f".replaced-out-{os.getpid()}"]
    assert os.listdir(tmp_path) == ["out"]


def test_the_order_that_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show a missing fsync, so the order itself is asserted: data, manifest, folders, name, parent."""
    trace: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        trace.append(str(path.relative_to(tmp_path)).replace(f".partial-out-{os.getpid()}", "stage"))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        trace.append(f"rename {Path(target).name}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    publish(tmp_path / "out", "one")
    assert trace == [
        "stage/grid/plan.json",
        "stage/model.safetensors",
        "stage/manifest.json",
        "stage/manifest.sha256",
        "stage",
        "stage/grid",
        "rename out",
        ".",
    ]


@pytest.mark.parametrize("failure", [0, errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_every_step_of_an_overwrite_may_fail(tmp_path: Path, failure: int) -> None:
    """Old or new, whole, after a sweep; without a sweep too unless killed between the two renames."""
    statuses: list[int] = []
    contents: list[str] = []
    while 2 not in statuses:
        k = len(statuses) + 1
        root = tmp_path / f"{k}"
        publish(root / "out", "old")

        def work(k: int = k, root: Path = root) -> int:
            reached = fail_at(k, root, failure)
            try:
                publish(root / "out", "new", overwrite=True)
            except CheckpointError:
                return 1
            return 0 if reached() else 2

        statuses.append(in_child(work))
        if failure:
            content(root / "out")
        sweep_partials(root)
        contents.append(content(root / "out"))
        assert leftovers(root) == [], k
    assert set(statuses) <= ({9, 2} if failure == 0 else {0, 1, 2})
    assert all(found == "new" for found, status in zip(contents, statuses, strict=True) if status in (0, 2))
    assert len(statuses) > 40
    assert contents.count("old") > 20
    assert contents.count("new") > 5
    if failure == 0:
        assert "old" not in contents[contents.index("new") :]


def test_sweep_spares_the_living_and_restores_what_stepped_aside(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    publish(tmp_path / "out", "old")
    os.rename(tmp_path / "out", tmp_path / f".replaced-out-{dead}")
    for name in (f".partial-out-{dead}", f".partial-other-{os.getppid()}", f".partial-mine-{os.getpid()}"):
        (tmp_path / name).mkdir()
    (tmp_path / f".partial-file.json-{dead}").write_text("half")
    (tmp_path / ".partial-notes").write_text("not ours")
    with publish_folder(tmp_path / "open") as stage:
        swept = {path.name for path in sweep_partials(tmp_path)}
        assert stage.is_dir()
        (stage / "a").write_text("a")
    assert swept == {
        f".partial-out-{dead}",
        f".replaced-out-{dead}",
        f".partial-mine-{os.getpid()}",
        f".partial-file.json-{dead}",
    }
    assert content(tmp_path / "out") == "old"
    assert is_complete(tmp_path / "open")
    assert sorted(leftovers(tmp_path)) == sorted([f".partial-other-{os.getppid()}", ".partial-notes"])
    assert sweep_partials(tmp_path / "missing") == []


def test_write_json_atomic(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json_atomic(path, {"x": 0.1 + 0.2})
    assert json.loads(path.read_text()) == {"x": 0.30000000000000004}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 0.30000000000000004}
    assert os.listdir(tmp_path) == ["results.json"]
    with pytest.raises(CheckpointError, match="a part of the path is a file"):
        write_json_atomic(path / "below", {})
