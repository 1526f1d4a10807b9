"""Write a source as a folder of pictures and LLaVA rows: ``grace data prepare SOURCE OUT``.

The folder::

    OUT/images/*.png
    OUT/train.jsonl  OUT/val.jsonl  OUT/test.jsonl     one question a row
    OUT/README.md                                      source, licence, seed, counts
    OUT/manifest.json                                  the same for machines, with SHA-256 of the rows and pictures

A row is ``{"id", "image", "kind", "form", "conversations"}``; ``kind`` is what the question asks and ``form`` is
``open``, ``yes_no`` or ``choice``, for accuracies by kind. The source ``toy`` is ``mix`` with 12,000 scenes to train
on, laid out for two stages as LLaVA's data is: ``train.jsonl`` has one caption and one conversation a picture (learn
to see), ``train_questions.jsonl`` 20 questions a scene, four a row (learn to look things up).

The same source, seed and sizes give the same bytes. All is written into ``OUT.partial-<pid>`` and renamed at the end,
so OUT is complete or absent.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grace_vlm.data.sources import easy_vqa, scenes
from grace_vlm.data.sources.questions import AskedPicture, Question, Sizes
from grace_vlm.errors import CheckpointError, ConfigError

_PARTS = {"easy-vqa": (easy_vqa,), "scenes": (scenes,), "mix": (easy_vqa, scenes), "toy": (easy_vqa, scenes)}
# What the toy bases are trained on: more scenes, because they are told apart by what they can do with them.
_TOY_SCENES = Sizes(num_train_images=12_000, num_val_images=300, num_test_images=600)
SOURCES = tuple(_PARTS)
SPLITS = ("train", "val", "test")
CAPTION_REQUEST = "describe the picture."
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
_SIZE_NAMES = tuple(size.name for size in dataclasses.fields(Sizes))


@dataclass(frozen=True)
class PreparedInfo:
    """What was written: by file of rows its pictures, its rows and its SHA-256; by kind the questions."""

    out: Path
    source: str
    seed: int
    num_images: Mapping[str, int]
    num_rows: Mapping[str, int]
    num_questions: Mapping[str, int]
    rows_sha256: Mapping[str, str]
    images_sha256: str


def prepare(source: str, out: Path, *, seed: int = 0, overwrite: bool = False, **sizes: int) -> PreparedInfo:
    """Make ``source`` (one of ``SOURCES``) into the folder ``out``.

    Args:
        sizes: ``num_train_images``, ``num_val_images``, ``num_test_images``, of each part of the source; what is not
            given is the part's default (3600/400/1000 for easy-vqa; 6000/300/600 for scenes, with 12,000 to train on
            in toy).

    Raises:
        ConfigError: an unknown source or size, a missing package.
        CheckpointError: an existing ``out`` without ``overwrite``.
    """
    if source not in _PARTS:
        raise ConfigError(f"unknown source {source!r}; choose one of {', '.join(SOURCES)}")
    for name, value in sizes.items():
        if name not in _SIZE_NAMES:
            raise ConfigError(f"unknown size {name!r}; choose among {', '.join(_SIZE_NAMES)}")
        if value < 0:
            raise ConfigError(f"{name}={value}: a number of pictures is expected, 0 or more")
    out = Path(out)
    refuse_existing(out, overwrite)
    with staged_folder(out) as staging:
        (staging / "images").mkdir()
        return _write(staging, out, source, seed, sizes)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """``CheckpointError`` if ``out`` is there and may not be replaced."""
    if os.path.lexists(out) and not overwrite:
        raise CheckpointError(f"{out} already exists; choose another path or pass --overwrite")


def check_place(out: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """``CheckpointError`` if ``out`` must not be replaced, which must never cost ``inputs`` or somebody's own files."""
    refuse_existing(out, overwrite)
    if not os.path.lexists(out):
        return
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise CheckpointError(f"{out} holds {path}, which is read; give another folder")
    if not (out / "manifest.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(
            f"{out} was not made by grace (no manifest.json); delete it yourself or give another folder"
        )


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that becomes ``out`` if the block ends well, and vanishes if it does not.

    Raises:
        CheckpointError: the disk refuses; what was at ``out`` before is untouched.
    """
    target = out.absolute()  # "." has no name to stage beside
    staging = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        _publish(staging, target)
    except OSError as error:
        # Files that are read lie elsewhere; a full disk names no file.
        where = Path(os.fsdecode(error.filename)) if error.filename else staging
        if error.errno not in _REFUSALS or not (where.is_relative_to(staging) or target.is_relative_to(where)):
            raise
        reason = os.strerror(error.errno).lower()
        raise CheckpointError(f"cannot write {out}: {reason}; what was there before is untouched") from error
    finally:
        # Gone by its rename if all went well.
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    """Rename the finished folder to its name; an older one steps aside first and goes last."""
    if not os.path.lexists(out):
        staging.rename(out)
        return
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    out.rename(old)
    staging.rename(out)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink()


@dataclass
class _Tally:
    """What the writing counts and digests on its way."""

    num_images: Counter[str] = field(default_factory=Counter)
    num_rows: Counter[str] = field(default_factory=Counter)
    num_questions: Counter[str] = field(default_factory=Counter)
    rows_sha256: dict[str, str] = field(default_factory=dict)


def _write(folder: Path, out: Path, source: str, seed: int, sizes: Mapping[str, int]) -> PreparedInfo:
    tally = _Tally()
    images_sha256 = hashlib.sha256()
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    if source == "toy":
        lines["train_questions"] = []
    for picture in _pictures(source, seed, sizes):
        (folder / "images" / picture.name).write_bytes(picture.png)
        images_sha256.update(picture.name.encode() + hashlib.sha256(picture.png).digest())
        tally.num_images[picture.split] += 1
        tally.num_questions.update(question.kind for question in picture.questions)
        if source == "toy" and picture.split == "train":
            lines["train"].extend(_dense_rows(picture))
            tally.num_images["train_questions"] += 1
            lines["train_questions"].extend(_short_conversations(picture))
        else:
            lines[picture.split].extend(_rows(picture))
    for split in lines:
        content = "".join(lines[split]).encode()
        (folder / f"{split}.jsonl").write_bytes(content)
        tally.num_rows[split] = len(lines[split])
        tally.rows_sha256[split] = hashlib.sha256(content).hexdigest()
    info = PreparedInfo(
        out=out,
        source=source,
        seed=seed,
        num_images={name: tally.num_images[name] for name in lines},
        num_rows=dict(tally.num_rows),
        num_questions=dict(sorted(tally.num_questions.items())),
        rows_sha256=tally.rows_sha256,
        images_sha256=images_sha256.hexdigest(),
    )
    manifest = {key: value for key, value in dataclasses.asdict(info).items() if key != "out"}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (folder / "README.md").write_text(_readme(info))
    return info


def _pictures(source: str, seed: int, sizes: Mapping[str, int]) -> Iterator[AskedPicture]:
    for part in _PARTS[source]:
        defaults = _TOY_SCENES if source == "toy" and part is scenes else part.DEFAULT_SIZES
        yield from part.pictures(seed, dataclasses.replace(defaults, **sizes))


def _rows(picture: AskedPicture) -> Iterator[str]:
    """One row a question."""
    for number, question in enumerate(picture.questions):
        turns = [(question.text, question.answer)]
        yield _row(picture, f"{number:02d}", question.kind, question.form, turns)


def _dense_rows(picture: AskedPicture) -> Iterator[str]:
    """As LLaVA's mix and ShareGPT4V lay their rows out: all questions in one conversation, and a caption."""
    yield _conversation(picture, "questions", picture.questions)
    if picture.caption:
        yield _row(picture, "caption", "caption", "caption", [(CAPTION_REQUEST, picture.caption)])


def _short_conversations(picture: AskedPicture) -> Iterator[str]:
    """Many questions in rows of four: few enough that the last question is easily found again."""
    questions = picture.more_questions or picture.questions
    for start in range(0, len(questions), 4):
        yield _conversation(picture, f"more-{start:02d}", questions[start : start + 4])


def _conversation(picture: AskedPicture, suffix: str, questions: Sequence[Question]) -> str:
    turns = [(question.text, question.answer) for question in questions]
    return _row(picture, suffix, "conversation", "conversation", turns)


def _row(picture: AskedPicture, suffix: str, kind: str, form: str, turns: list[tuple[str, str]]) -> str:
    conversations: list[dict[str, str]] = []
    for question, answer in turns:
        marker = "" if conversations else "<image>\n"
        conversations.append({"from": "human", "value": f"{marker}{question}"})
        conversations.append({"from": "gpt", "value": answer})
    row = {
        "id": f"{picture.name.removesuffix('.png')}-{suffix}",
        "image": f"images/{picture.name}",
        "kind": kind,
        "form": form,
        "conversations": conversations,
    }
    return json.dumps(row) + "\n"


def _readme(info: PreparedInfo) -> str:
    licences = "\n".join(f"- {part.LICENCE}" for part in _PARTS[info.source])
    splits = "\n".join(f"| {name} | {info.num_images[name]} | {rows} |" for name, rows in info.num_rows.items())
    kinds = "\n".join(f"| {kind} | {count} |" for kind, count in info.num_questions.items())
    return f"""# {info.source}, seed {info.seed}

Made by `grace data prepare {info.source}`; made again with the same seed and sizes it has the same bytes.
Rows are LLaVA conversations; `manifest.json` has the SHA-256 of every file of rows.

Licence:

{licences}

| rows of | pictures | rows |
|---|---|---|
{splits}

| kind of question | rows |
|---|---|
{kinds}
"""
