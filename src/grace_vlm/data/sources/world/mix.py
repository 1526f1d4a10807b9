"""Write the mix: ``grace data prepare world OUT --emoji PATH --flags PATH``.

The folder::

    OUT/images/<part>/<split>-<number>.jpg|png
    OUT/train.jsonl           one question a row: four to six rows a picture
    OUT/conversations.jsonl   the same questions, those of a picture in one row
    OUT/captions.jsonl        one row a training picture: for the stage that trains tower and projector
    OUT/test.jsonl            other pictures; the kinds that begin with ``unseen_`` show things that training never does
    OUT/README.md             sources, licences, counts
    OUT/manifest.json         the same for machines, with packages, hashes, held-out things and blind baselines

A row is ``{"id", "image", "kind", "form", "category", "conversations"}``, ``category`` being the part. The same options
and packages give the same bytes, whatever the number of processes. A picture whose bytes were there before is left out,
those of the tests being drawn first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grace_vlm.data.sources import easy_vqa
from grace_vlm.data.sources.prepare import CAPTION_REQUEST, check_place, staged_folder
from grace_vlm.data.sources.world import digits_source, emoji, flags, series
from grace_vlm.data.sources.world.balance import Blind
from grace_vlm.data.sources.world.digits_source import DigitsSource
from grace_vlm.data.sources.world.easy_source import EasySource
from grace_vlm.data.sources.world.emoji_source import EmojiSource
from grace_vlm.data.sources.world.flags_source import FlagsSource
from grace_vlm.data.sources.world.packages import Package, find_installed, require_installed
from grace_vlm.data.sources.world.plan import DEFAULT_ROWS, MIN_ROWS, SHARES, plan
from grace_vlm.data.sources.world.scenes_source import ScenesSource
from grace_vlm.data.sources.world.tables_source import TablesSource
from grace_vlm.data.sources.world.workers import Filed, SourceMaker, run_jobs
from grace_vlm.errors import ConfigError
from grace_vlm.media.pillow import pillow_version

SOURCE = "world"
FILES = ("train", "conversations", "captions", "test")
_SCRATCH = ".scratch"
PACKAGES = ("easy-vqa", "pyarrow", "resvg-py", "scikit-learn", "vega-datasets")
"""The extra ``world``; pyarrow is for the part in the kinds of benchmarks."""
_EASY_VQA = tuple(f"data/{part}/{what}" for part in ("train", "test") for what in ("questions.json", "images/"))
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class WorldInfo:
    """What was written: ``num_rows`` by file, ``num_images`` by split, ``manifest`` as it stands in the folder."""

    out: Path
    num_rows: Mapping[str, int]
    num_images: Mapping[str, int]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """A part's source, and the packages that it is made from."""

    maker: SourceMaker
    rows_per_unit: Mapping[str, float]
    packages: tuple[Package, ...] = ()


def prepare_world(
    out: Path,
    *,
    emoji_package: Path,
    flags_package: Path,
    suite: tuple[SourceMaker, Mapping[str, float]] | None = None,
    num_rows: int = DEFAULT_ROWS,
    seed: int = 0,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, note: None,
) -> WorldInfo:
    """Make the mix into the folder ``out``, complete or not at all.

    Args:
        emoji_package, flags_package: the npm packages emoji-datasource-google and flag-icons, archives or folders.
        suite: what makes the part in the kinds of benchmarks, and its rows a unit by split; without it the others fill
            its place.
        num_rows: rows to train on, about. num_workers: processes that draw; default: the cores.

    Raises:
        ConfigError: a package is missing or another one, or a number is out of its range. CheckpointError: ``out`` is
            there already.
        DataError: a package's files are damaged.
    """
    out = Path(out)
    if num_rows < MIN_ROWS:
        raise ConfigError(f"rows={num_rows}: {MIN_ROWS} or more are expected, so that every part has some")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"workers={num_workers}: a number of processes is expected, 1 or more")
    check_place(out, overwrite, (emoji_package, flags_package))
    require_installed("world", [name for name in PACKAGES if suite is not None or name != "pyarrow"])
    with staged_folder(out) as staging:
        parts = _parts(staging / _SCRATCH, emoji_package, flags_package, seed)
        if suite is not None:
            parts["suite"] = _Part(*suite)
        for part in parts:
            (staging / "images" / part).mkdir(parents=True)
        jobs = plan(num_rows, {name: part.rows_per_unit for name, part in parts.items()})
        makers = {name: part.maker for name, part in parts.items()}
        writing = _Writing(staging)
        for done, filed in enumerate(run_jobs(jobs, makers, staging, num_workers or os.cpu_count() or 1), 1):
            writing.add(filed)
            progress(done, len(jobs), "drawing")
        held_out = {
            "emoji": sorted(emoji.read_catalogue(parts["emoji"].packages[0].folder, seed).held_out),
            "flags": sorted(flags.read_atlas(parts["flags"].packages[0].folder, _rendered(staging), seed).held_out),
        }
        shutil.rmtree(staging / _SCRATCH)
        packages = {one.name: one for name in SHARES if name in parts for one in parts[name].packages}
        info = writing.finish(out, seed, num_rows, packages.values(), held_out)
    return info


def _rendered(staging: Path) -> Path:
    return staging / _SCRATCH / "rendered"


def _parts(scratch: Path, emoji_package: Path, flags_package: Path, seed: int) -> dict[str, _Part]:
    """Every part but the suite's; archives are unpacked and flags rendered into ``scratch``."""
    scratch.mkdir()
    faces, banners = emoji.open_package(emoji_package, scratch), flags.open_package(flags_package, scratch)
    tables, scans = series.find_package(), digits_source.find_package()
    easy = find_installed("easy-vqa", easy_vqa.LICENCE, _EASY_VQA)
    rendered = scratch / "rendered"
    flags.render(banners.folder, rendered)
    makers: dict[str, tuple[SourceMaker, Mapping[str, float], tuple[Package, ...]]] = {
        "emoji": (partial(EmojiSource, faces.folder, seed), EmojiSource.rows_per_unit, (faces,)),
        "flags": (partial(FlagsSource, banners.folder, rendered, seed), FlagsSource.rows_per_unit, (banners,)),
        "tables": (partial(TablesSource, tables.folder, seed), TablesSource.rows_per_unit, (tables,)),
        "digits": (partial(DigitsSource, scans.folder, seed), DigitsSource.rows_per_unit, (scans,)),
        "easy": (partial(EasySource, seed), EasySource.rows_per_unit, (easy,)),
        "scenes": (partial(ScenesSource, seed), ScenesSource.rows_per_unit, (easy,)),
    }
    return {name: _Part(*made) for name, made in makers.items()}


@dataclass
class _Writing:
    """Rows on their way into files, and what is counted and digested meanwhile."""

    folder: Path
    seen: set[tuple[str, ...]] = field(default_factory=set)
    num_images: Counter[str] = field(default_factory=Counter)
    num_left_out: int = 0
    kinds: dict[str, Counter[str]] = field(default_factory=lambda: {"train": Counter(), "test": Counter()})
    categories: dict[str, Counter[str]] = field(default_factory=lambda: {"train": Counter(), "test": Counter()})
    lines: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in FILES})
    images: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    blind: Blind = field(default_factory=Blind)

    def add(self, found: Sequence[Filed]) -> None:
        """The rows of what a job drew; what was drawn before is left out, and so is what nothing is asked about."""
        for filed in found:
            if filed.digests in self.seen or not filed.questions:
                self.num_left_out += 1
                for name in filed.images:
                    (self.folder / name).unlink()
                continue
            self.seen.add(filed.digests)
            self.images.update(zip(filed.images, filed.digests, strict=False))
            self.num_bytes += sum((self.folder / name).stat().st_size for name in filed.images)
            self._add(filed)

    def _add(self, filed: Filed) -> None:
        split = "train" if filed.job.split == "train" else "test"
        self.num_images[split] += len(filed.images)
        part, prefix = filed.job.part, "unseen_" if filed.job.split == "unseen" else ""
        stem = _stem(filed)
        for number, question in enumerate(filed.questions):
            kind = prefix + question.kind
            self.kinds[split][kind] += 1
            self.categories[split][prefix + part] += 1
            note = self.blind.learn if split == "train" else self.blind.be_asked
            note(kind, question.text, question.answer)
            turns = [(question.text, question.answer)]
            self.lines[split].append(_row(filed, f"{stem}-{number}", kind, question.form, prefix + part, turns))
        if split == "train":
            self.lines["conversations"] += _conversations(filed, stem)
            if filed.caption:
                turns = [(CAPTION_REQUEST, filed.caption)]
                self.lines["captions"].append(_row(filed, f"{stem}-caption", "caption", "caption", part, turns))

    def finish(
        self, out: Path, seed: int, num_rows: int, packages: Any, held_out: Mapping[str, Sequence[str]]
    ) -> WorldInfo:
        """Write all files but the pictures, which are there."""
        rows_sha256 = {}
        for name, lines in self.lines.items():
            content = "".join(lines).encode()
            (self.folder / f"{name}.jsonl").write_bytes(content)
            rows_sha256[name] = hashlib.sha256(content).hexdigest()
        images = hashlib.sha256()
        for name in sorted(self.images):
            images.update(name.encode() + bytes.fromhex(self.images[name]))
        manifest: dict[str, Any] = {
            "source": SOURCE,
            "seed": seed,
            "rows": num_rows,
            "packages": [one.record() for one in packages],
            "drawn_by": {"pillow": pillow_version(), "resvg-py": flags.renderer_version()},
            "num_rows": {name: len(lines) for name, lines in self.lines.items()},
            "num_images": dict(self.num_images),
            "num_image_bytes": self.num_bytes,
            "num_left_out": self.num_left_out,
            "categories": {split: dict(sorted(counts.items())) for split, counts in self.categories.items()},
            "kinds": {split: dict(sorted(counts.items())) for split, counts in self.kinds.items()},
            "held_out": {name: list(members) for name, members in held_out.items()},
            "blind": {
                "constant": self.blind.constant(),
                "by_text": self.blind.by_text(),
                "by_text_whole": self.blind.whole(),
            },
            "rows_sha256": rows_sha256,
            "images_sha256": images.hexdigest(),
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (self.folder / "README.md").write_text(_readme(manifest), encoding="utf-8")
        return WorldInfo(out, manifest["num_rows"], manifest["num_images"], manifest)


def _stem(filed: Filed) -> str:
    """Of the ids: the part with its first picture's name, or with the text's digest where there is none."""
    name = Path(filed.images[0]).stem if filed.images else f"{filed.job.split}-{filed.digests[0][:16]}"
    return f"{filed.job.part}-{name}"


def _conversations(filed: Filed, stem: str) -> Iterator[str]:
    """All questions of a picture in one row; those that place several pictures themselves stay alone."""
    if len(filed.images) == 1 and not any("<image>" in one.text for one in filed.questions):
        turns = [(one.text, one.answer) for one in filed.questions]
        yield _row(filed, f"{stem}-all", "conversation", "conversation", filed.job.part, turns)
        return
    for number, one in enumerate(filed.questions):
        yield _row(
            filed, f"{stem}-all-{number}", "conversation", "conversation", filed.job.part, [(one.text, one.answer)]
        )


def _row(filed: Filed, row_id: str, kind: str, form: str, category: str, turns: Sequence[tuple[str, str]]) -> str:
    conversations = []
    for number, (text, answer) in enumerate(turns):
        marked = text if number or "<image>" in text else "<image>\n" * len(filed.images) + text
        conversations += [{"from": "human", "value": marked}, {"from": "gpt", "value": answer}]
    image = {} if not filed.images else {"image": filed.images[0] if len(filed.images) == 1 else list(filed.images)}
    row = {"id": row_id, **image, "kind": kind, "form": form, "category": category, "conversations": conversations}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _readme(manifest: Mapping[str, Any]) -> str:
    packages = "\n".join(f"- {one['name']} {one['version']}: {one['licence']}" for one in manifest["packages"])
    files = "\n".join(f"| {name}.jsonl | {number} |" for name, number in manifest["num_rows"].items())
    parts = "\n".join(
        f"| {name} | {manifest['categories']['train'].get(name, 0)} | {manifest['categories']['test'].get(name, 0)} |"
        for name in sorted({*manifest["categories"]["train"], *manifest["categories"]["test"]})
    )
    return f"""# world, seed {manifest["seed"]}

Made by `grace data prepare world`; made again from the same packages with the same options it has the same bytes.
`manifest.json` has counts by kind, hashes, the things held out of training, and what can be answered without looking.

Pictures and figures are from these packages, composed and drawn by grace-vlm (Apache-2.0):

{packages}

| file | rows |
|---|---|
{files}

| part | rows to train on | rows of the test |
|---|---|---|
{parts}
"""
