"""The flags of ``flag-icons``: 249 countries and territories with name, capital and continent (MIT)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grace_vlm.data.sources.world.packages import Package, open_npm, read_json
from grace_vlm.errors import ConfigError, DataError

NAME = "flag-icons"
PICTURES = "flags/4x3/"
LICENCE = "MIT (Panayiotis Lipiridis)"
HELD_OUT_FRACTION = 0.05
WIDTH_PX = 160
TOY_SUITE = (
    "Armenia", "Belgium", "Bulgaria", "Estonia", "France", "Germany", "Hungary", "Ireland", "Italy", "Lithuania",
    "Nigeria", "Peru", "Romania", "Russia",
)  # fmt: skip
"""Countries whose flags the toy suite draws: the mix's part of that kind trains on them, so none is held out."""
_FLOWN_ELSEWHERE = ("au", "fr", "gb", "nl", "no", "us")


@dataclass(frozen=True)
class Country:
    """A country or territory; ``capital`` and ``continent`` are empty where the package knows none."""

    code: str
    name: str
    capital: str
    continent: str


@dataclass(frozen=True)
class Atlas:
    """Countries by name; the flags of ``held_out`` are in no training picture and their names in no training question.
    ``pictures``: name -> PNG file of the rendered flag."""

    countries: Mapping[str, Country]
    held_out: frozenset[str]
    pictures: Mapping[str, Path]


def open_package(given: Path, scratch: Path) -> Package:
    """The package that the user gives (``packages.open_npm``)."""
    return open_npm(given, NAME, ("country.json", PICTURES), LICENCE, scratch)


def render(folder: Path, target: Path) -> None:
    """Render every country's flag into ``target`` as PNG of 160 x 120 pixels.

    Raises:
        ConfigError: resvg-py is not installed. DataError: a flag that cannot be rendered, or ``country.json`` is none.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ConfigError("flags need the package resvg-py, which is not installed; pip install resvg-py") from error
    target.mkdir(parents=True, exist_ok=True)
    for country in _read_countries(folder):
        svg = folder / PICTURES / f"{country.code}.svg"
        try:
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg.read_text(encoding="utf-8"), width=WIDTH_PX))
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{svg} cannot be rendered; fetch the package {NAME} again") from error
        (target / f"{country.code}.png").write_bytes(png)


def renderer_version() -> str:
    """Of the installed resvg-py."""
    return importlib.metadata.version("resvg-py")


def read_atlas(folder: Path, rendered: Path, seed: int) -> Atlas:
    """Countries whose flags all differ, and the 5 % that the seed holds out of training."""
    countries: dict[str, Country] = {}
    pictures: dict[str, Path] = {}
    seen: set[str] = set()
    # Of a country and territories that fly its flag, the country is the answer.
    for country in sorted(_read_countries(folder), key=lambda one: (one.code not in _FLOWN_ELSEWHERE, one.name)):
        path = rendered / f"{country.code}.png"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            countries[country.name], pictures[country.name] = country, path
    ordered = dict(sorted(countries.items()))
    whole = [
        name for name, country in ordered.items() if country.capital and country.continent and name not in TOY_SUITE
    ]
    held_out = random.Random(f"{seed}/world/flags/held out").sample(
        whole, max(len(whole) >= 8, round(HELD_OUT_FRACTION * len(whole)))
    )
    return Atlas(ordered, frozenset(held_out), pictures)


def _read_countries(folder: Path) -> list[Country]:
    records = read_json(folder / "country.json")
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise DataError(f"{folder / 'country.json'} is no list of countries; fetch the package {NAME} again")
    return [
        Country(str(one["code"]), str(one["name"]), str(one.get("capital") or ""), str(one.get("continent") or ""))
        for one in records
        if one.get("iso") and isinstance(one.get("code"), str) and one["code"].isalnum()
    ]
