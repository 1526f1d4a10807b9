"""The mix as a folder: the same bytes from any number of processes, nothing of the test in the training, and errors."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from tiny_packages import emoji_files, flag_files, write_archive, write_digits, write_folder

from grace_vlm.data.check import check_file
from grace_vlm.data.sources.world import packages
from grace_vlm.data.sources.world.balance import Blind
from grace_vlm.data.sources.world.mix import prepare_world
from grace_vlm.data.sources.world.packages import open_npm
from grace_vlm.data.sources.world.plan import SHARES, plan
from grace_vlm.errors import CheckpointError, ConfigError, DataError

NUM_ROWS = 1200


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Archives of the npm packages, and scikit-learn's digits on the path."""
    pytest.importorskip("resvg_py")
    folder = tmp_path_factory.mktemp("packages")
    write_digits(folder / "site")
    return {
        "emoji_package": write_archive(folder / "emoji.tgz", emoji_files()),
        "flags_package": write_archive(folder / "flags.tgz", flag_files()),
        "site": folder / "site",
    }


@pytest.fixture(scope="module")
def made(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(given["site"]))
        prepare(given, out, num_workers=1)
    return out


def prepare(given: dict[str, Path], out: Path, **options: Any) -> Any:
    places = {name: given[name] for name in ("emoji_package", "flags_package")}
    return prepare_world(out, **{**places, "num_rows": NUM_ROWS, **options})


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_processes_and_a_folder_give_the_bytes_of_one_process_and_an_archive(
    given: dict[str, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(given["site"]))
    steps: list[tuple[int, int]] = []
    unpacked = write_folder(tmp_path / "node_modules" / "emoji-datasource-google", emoji_files())
    write_folder(unpacked, {"img/google/128/other.png": b"not read"})
    info = prepare(
        {**given, "emoji_package": tmp_path},
        tmp_path / "out",
        num_workers=2,
        progress=lambda done, total, note: steps.append((done, total)),
    )
    assert contents(tmp_path / "out") == contents(made)
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    assert info.num_rows["train"] == len(rows_of(made, "train"))
    assert not list(tmp_path.glob("*.partial*"))


def test_another_seed_is_another_mix(given: dict[str, Path], made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(given["site"]))
    prepare(given, tmp_path / "out", seed=1, num_workers=1)
    pictures = {name: digest for name, digest in contents(made).items() if name.startswith("images/")}
    others = contents(tmp_path / "out")
    # easy-VQA's own pictures are the same ones, of whatever seed.
    drawn = [name for name in pictures.keys() & others.keys() if not name.startswith("images/easy/")]
    assert len(drawn) > 100
    assert all(pictures[name] != others[name] for name in drawn)


def test_rows_can_be_trained_on_and_files_agree(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    pictures = {name for name in contents(made) if name.startswith("images/")}
    shown: set[str] = set()
    for name, number in manifest["num_rows"].items():
        result = check_file(made / f"{name}.jsonl", made)
        assert (result.num_rows, result.num_good) == (number, number)
        rows = rows_of(made, name)
        assert len({row["id"] for row in rows}) == len(rows)
        shown.update(row["image"] for row in rows)
        assert manifest["rows_sha256"][name] == hashlib.sha256((made / f"{name}.jsonl").read_bytes()).hexdigest()
    assert shown == pictures
    assert sum(manifest["num_images"].values()) == len(pictures)
    assert manifest["num_image_bytes"] == sum((made / name).stat().st_size for name in pictures)
    assert [one["name"] for one in manifest["packages"]] == [
        "emoji-datasource-google", "flag-icons", "vega-datasets", "scikit-learn", "easy-vqa",
    ]  # fmt: skip
    assert all(len(one["sha256"]) == 64 and one["version"] and one["licence"] for one in manifest["packages"])
    for split in ("train", "test"):
        rows = rows_of(made, split)
        assert manifest["kinds"][split] == dict(sorted(Counter(row["kind"] for row in rows).items()))
        assert manifest["categories"][split] == dict(sorted(Counter(row["category"] for row in rows).items()))


def test_a_conversation_has_all_questions_of_its_picture(made: Path) -> None:
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows_of(made, "train"):
        question, answer = (turn["value"] for turn in row["conversations"])
        assert question.startswith("<image>\n")
        asked[row["image"]].append((question.removeprefix("<image>\n"), answer))
    conversations = rows_of(made, "conversations")
    assert len(conversations) == len(asked)
    for row in conversations:
        texts = [turn["value"] for turn in row["conversations"]]
        assert texts[0].startswith("<image>\n")
        assert (
            list(zip([texts[0].removeprefix("<image>\n"), *texts[2::2]], texts[1::2], strict=True))
            == asked[row["image"]]
        )
    captions = rows_of(made, "captions")
    assert {row["image"] for row in captions} == set(asked)
    assert {row["conversations"][0]["value"] for row in captions} == {"<image>\ndescribe the picture."}


def test_nothing_of_the_test_is_in_the_training(made: Path) -> None:
    digests: dict[str, set[str]] = {}
    for split in ("train", "test"):
        names = {row["image"] for row in rows_of(made, split)}
        digests[split] = {hashlib.sha256((made / name).read_bytes()).hexdigest() for name in names}
        assert len(digests[split]) == len(names)
    assert not digests["train"] & digests["test"]
    held_out = json.loads((made / "manifest.json").read_text(encoding="utf-8"))["held_out"]
    names = {name.lower() for members in held_out.values() for name in members}
    assert len(names) == 4
    for name in ("train", "conversations", "captions"):
        for row in rows_of(made, name):
            words = " ".join(turn["value"] for turn in row["conversations"]).lower()
            assert not any(f" {name} " in f" {words.translate(str.maketrans('.,?;:', '     '))} " for name in names), (
                row
            )
    for row in rows_of(made, "test"):
        is_unseen = row["kind"].startswith("unseen_")
        assert is_unseen == row["category"].startswith("unseen_") == ("/unseen-" in row["image"])
    assert {row["category"] for row in rows_of(made, "test")} >= {"unseen_emoji", "unseen_flags", "emoji", "tables"}


def test_no_kind_is_answered_by_one_answer(made: Path) -> None:
    """The tiny packages have three sorts of things, so the shares of the real ones are another test's (interop)."""
    blind = json.loads((made / "manifest.json").read_text(encoding="utf-8"))["blind"]
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows_of(made, "train"):
        answers[row["kind"]][row["conversations"][-1]["value"]] += 1
    shares = {kind: max(found.values()) / found.total() for kind, found in answers.items() if found.total() >= 30}
    assert blind["constant"] == {kind: round(share, 4) for kind, share in sorted(shares.items())}
    yes_no = {kind for kind, found in answers.items() if set(found) <= {"yes", "no"}}
    assert all(0.35 < answers[kind]["yes"] / answers[kind].total() < 0.65 for kind in yes_no if kind in shares)


def test_blind_baselines_by_hand() -> None:
    blind = Blind()
    for number in range(40):
        blind.learn("k", "a?", "yes" if number % 4 else "no")
        blind.be_asked("k", "a?", "yes" if number % 2 else "no")  # half of them yes
        blind.be_asked("unseen_k", "new?", "yes")  # by its kind
    blind.learn("rare", "b?", "x")
    blind.be_asked("rare", "b?", "x")
    assert blind.constant() == {"k": 0.75}
    assert blind.by_text() == {"k": 0.5, "unseen_k": 1.0}
    assert blind.whole() == 0.75


def test_the_plan_has_the_shares_and_the_tests_first() -> None:
    rows_per_unit = {part: {"train": 6.0, "test": 6.0, "unseen": 3.0} for part in SHARES}
    jobs = plan(60_000, rows_per_unit)
    order = [job.split for job in jobs]
    assert order == sorted(order, key=["unseen", "test", "train"].index)
    rows: Counter[str] = Counter()
    for job in jobs:
        if job.split == "train":
            rows[job.part] += 6 * (job.stop - job.start)
    assert {part: round(number / 60_000, 2) for part, number in rows.items()} == SHARES
    without = plan(60_000, {part: rows for part, rows in rows_per_unit.items() if part != "suite"})
    assert sum(6 * (job.stop - job.start) for job in without if job.split == "train") == pytest.approx(60_000, rel=0.01)


# --- packages and errors ---


def test_errors_say_what_to_get(given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(kind: type[Exception] = ConfigError, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            prepare(given, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("*.partial*"))
        return str(caught.value)

    monkeypatch.syspath_prepend(str(given["site"]))
    missing = tmp_path / "none.tgz"
    assert error(emoji_package=missing) == (
        f"{missing} does not exist; the npm package emoji-datasource-google is expected there, get it with: "
        "npm pack emoji-datasource-google"
    )
    assert error(emoji_package=given["flags_package"]) == (
        f"{given['flags_package']} is no npm package emoji-datasource-google; get it with: "
        "npm pack emoji-datasource-google"
    )
    (tmp_path / "empty").mkdir()
    assert error(flags_package=tmp_path / "empty") == (
        f"{tmp_path / 'empty'} has no package.json; the npm package flag-icons is expected there, get it with: "
        "npm pack flag-icons"
    )
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(given["emoji_package"].read_bytes()[:3000])
    assert error(DataError, emoji_package=cut) == (
        f"{cut} is no whole .tgz archive; get it with: npm pack emoji-datasource-google"
    )
    files = {name: content for name, content in emoji_files().items() if not name.endswith(".png")}
    folder = write_folder(tmp_path / "no-pictures", files)
    assert error(DataError, emoji_package=folder) == (
        f"{folder} has no img/google/64/, which emoji-datasource-google brings; get it with: "
        "npm pack emoji-datasource-google"
    )
    bad = write_folder(tmp_path / "bad-json", {**flag_files(), "country.json": b"{"})
    assert error(DataError, flags_package=bad) == (
        f"{bad / 'country.json'} is no JSON that can be read; fetch the package again"
    )
    broken = write_folder(tmp_path / "bad-svg", {**flag_files(), "flags/4x3/aa.svg": b"<svg"})
    assert error(DataError, flags_package=broken) == (
        f"{broken / 'flags/4x3/aa.svg'} cannot be rendered; fetch the package flag-icons again"
    )
    assert error(num_rows=10) == "rows=10: 600 or more are expected, so that every part has some"
    assert error(num_workers=0) == "workers=0: a number of processes is expected, 1 or more"


def test_a_picture_that_is_none_ends_a_started_process_s_work_too(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(given["site"]))
    files = emoji_files()
    pictures = [name for name in files if name.endswith(".png")]
    folder = write_folder(tmp_path / "emoji", {**files, **dict.fromkeys(pictures, b"GIF89a")})
    for num_workers in (1, 2):
        with pytest.raises(DataError, match="the file is no whole PNG; fetch the package again"):
            prepare({**given, "emoji_package": folder}, tmp_path / "out", num_workers=num_workers)
    assert not (tmp_path / "out").exists()


def test_missing_python_packages_are_named_at_once(given: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Before anything is written."""
    found = packages.importlib.util.find_spec
    gone = ["resvg_py", "sklearn", "pyarrow"]  # without the part in the kinds of benchmarks pyarrow is not needed
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name in gone else found(name))
    with pytest.raises(ConfigError) as caught:
        prepare(given, tmp_path / "out")
    assert str(caught.value) == (
        "the source world needs the packages resvg-py, scikit-learn, which are not installed; "
        "pip install resvg-py scikit-learn (the extra world)"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError) as caught:
        packages.require_installed("world", ["easy-vqa", "resvg-py"])
    assert str(caught.value) == (
        "the source world needs the package resvg-py, which is not installed; pip install resvg-py (the extra world)"
    )
    with pytest.raises(ConfigError) as caught:
        packages.find_installed("resvg-py", "", ())
    assert str(caught.value) == "the package resvg-py is not installed; pip install resvg-py"


def test_an_existing_folder_is_kept(given: dict[str, Path], made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists; choose another path or pass --overwrite"):
        prepare(given, made)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="was not made by grace"):
        prepare(given, tmp_path / "mine", overwrite=True)
    with pytest.raises(CheckpointError, match="which is read; give another folder"):
        prepare(given, given["emoji_package"].parent, overwrite=True)


def test_an_archive_writes_what_is_needed_and_nothing_elsewhere(tmp_path: Path) -> None:
    files = {
        "package.json": b'{"name": "p", "version": "1"}',
        "data/one.json": b"1",
        "data/deep/two.json": b"2",
        "../../out.json": b"no",
        "data/../../evil.json": b"no",
        "other.json": b"no",
    }
    archive = write_archive(tmp_path / "p.tgz", files)
    with tarfile.open(tmp_path / "links.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("package/package.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    package = open_npm(archive, "p", ("data/",), "MIT", tmp_path / "scratch")
    assert (package.name, package.version, package.licence) == ("p", "1", "MIT")
    assert contents(tmp_path / "scratch").keys() == {"p/package.json", "p/data/one.json"}
    with pytest.raises(ConfigError, match=r"has no package\.json"):
        open_npm(tmp_path / "links.tgz", "p", ("data/",), "MIT", tmp_path / "scratch2")
