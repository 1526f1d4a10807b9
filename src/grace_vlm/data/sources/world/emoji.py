"""The emoji of ``emoji-datasource-google``: 64 x 64 pictures of things with names (Noto emoji, Apache-2.0)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.data.sources.world.emoji_words import GROUPS, LEFT_OUT, RENAMED, SUBCATEGORIES
from grace_vlm.data.sources.world.packages import Package, open_npm, read_json
from grace_vlm.errors import DataError

NAME = "emoji-datasource-google"
PICTURES = "img/google/64/"
LICENCE = "emoji.json MIT (Cal Henderson), pictures Apache-2.0 (Google Noto)"
HELD_OUT_FRACTION = 0.05
_MAX_WORDS = 5
_PLAIN = (
    ("extraterrestrial ", ""),
    ("clock face ", ""),
    ("oclock", "o'clock"),
    ("large ", ""),
    ("savouring", "savoring"),
    (": ", " with "),
)


@dataclass(frozen=True)
class Emoji:
    """One thing: its name, its sort (of ``GROUPS``), its finer sort or None, and all pictures of it: skin tones too."""

    name: str
    group: str
    finer: str | None
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Catalogue:
    """All things, by name; those of ``held_out`` are in no training picture and no training question."""

    things: Mapping[str, Emoji]
    held_out: frozenset[str]

    def names(self, is_held_out: bool) -> list[str]:
        """Names of one side, sorted."""
        return [name for name in self.things if (name in self.held_out) == is_held_out]


def open_package(given: Path, scratch: Path) -> Package:
    """The package that the user gives (``packages.open_npm``)."""
    return open_npm(given, NAME, ("emoji.json", PICTURES), LICENCE, scratch)


def read_catalogue(folder: Path, seed: int) -> Catalogue:
    """What is asked about, and the 5 % of each sort that the seed holds out of training.

    Raises:
        DataError: ``emoji.json`` is none.
    """
    records = read_json(folder / "emoji.json")
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise DataError(f"{folder / 'emoji.json'} is no list of emoji; fetch the package again")
    found: dict[str, Emoji] = {}
    for record in records:
        thing = _thing(record, folder / PICTURES)
        if thing is not None:
            found.setdefault(thing.name, thing)
    things = dict(sorted(found.items()))
    if len(things) < 12:
        raise DataError(f"{folder} has pictures of {len(things)} emoji that can be asked about; expected 12 or more")
    rng = random.Random(f"{seed}/world/emoji/held out")
    held_out: set[str] = set()
    for group in GROUPS:
        members = [name for name, thing in things.items() if thing.group == group]
        held_out.update(rng.sample(members, max(len(members) >= 8, round(HELD_OUT_FRACTION * len(members)))))
    return Catalogue(things, frozenset(held_out))


def _thing(record: Mapping[str, Any], folder: Path) -> Emoji | None:
    """None for what is left out, has no picture, or has a name for programs only."""
    short, group = str(record.get("short_name", "")), SUBCATEGORIES.get(str(record.get("subcategory")))
    if group is None or short in LEFT_OUT or not record.get("has_img_google"):
        return None
    name = _name(short, str(record.get("name", "")))
    if name is None:
        return None
    tones = (record.get("skin_variations") or {}).values()
    # Of two people only those of one tone: a key of one code, not of two.
    images = [record.get("image"), *(one.get("image") for one in tones if "-" not in str(one.get("unified"))[5:])]
    pictures = tuple(path for image in images if image and (path := folder / Path(str(image)).name).is_file())
    return Emoji(name, *group, pictures) if pictures else None


def _name(short: str, given: str) -> str | None:
    """``hot dog`` of ``HOT DOG``; None for men and women of what has a person too, and for what no one would say."""
    if short in RENAMED:
        return RENAMED[short]
    name = given.lower().removesuffix(" symbol").removesuffix(" sign").replace("’", "'")
    for wordy, plain in _PLAIN:
        name = name.replace(wordy, plain)
    if short.startswith(("man-", "woman-", "male-", "female-", "male_", "female_")) or "facing right" in name:
        return None
    if "with " in name and name.split()[0] in ("man", "woman", "person") and name.split()[-1] in ("hair", "bald"):
        return None  # blond, red, curly: of the size shown they are men and women
    if ("small" in name.split()[:-1] and name.endswith(("square", "diamond"))) or "medium" in name:
        return None
    return name if 0 < len(name.split()) <= _MAX_WORDS and "thirty" not in name else None
