"""The part ``digits`` of the mix: handwritten digits, alone, as a number, or in a grid.

The 1,797 pictures of 8 x 8 are scikit-learn's copy of UCI's "Optical Recognition of Handwritten Digits"; they are read
from its file, without importing it. Every seventh is for tests alone.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from grace_vlm.data.sources.grids import light
from grace_vlm.data.sources.world.drawn import SIDE_PX, Asked, Drawn, Kind, ask, said
from grace_vlm.data.sources.world.emoji_questions import PLACES_2, PLACES_3
from grace_vlm.data.sources.world.packages import Package, find_installed
from grace_vlm.errors import DataError
from grace_vlm.media.canvas import COLORS, Rgb
from grace_vlm.media.collage import Collage, Ground, Pasted, gray_cutout

NAME = "scikit-learn"
LICENCE = "package BSD-3-Clause; digits CC BY 4.0 (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository)"
FILE = "datasets/data/digits.csv.gz"
NUM_QUESTIONS = 5
TEST_EVERY = 7
LAYOUTS = {"single": 2, "number": 4, "grid_2": 4, "grid_3": 3}
_DARK = ("black", "blue", "brown", "red", "teal")


@dataclass(frozen=True)
class Scan:
    """One written digit: coverage of 8 x 8 pixels, 0 to 255, row by row."""

    value: int
    coverage: bytes


@dataclass(frozen=True)
class DigitScene:
    """``scans`` row by row in rows of ``columns``."""

    layout: str
    ground: Rgb
    ink: Rgb
    columns: int
    scans: tuple[Scan, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """What is written, row by row."""
        return tuple(scan.value for scan in self.scans)


def find_package() -> Package:
    """The installed package.

    Raises:
        ConfigError: it is not installed.
    """
    return find_installed(NAME, LICENCE, (FILE,))


def read_scans(folder: Path) -> list[Scan]:
    """All digits, in the order of the file.

    Raises:
        DataError: the file is not what it was.
    """
    try:
        text = gzip.decompress((folder / FILE).read_bytes()).decode("ascii")
        rows = [[int(float(cell)) for cell in row] for row in csv.reader(io.StringIO(text))]
        scans = [Scan(row[64], bytes(min(255, 16 * value) for value in row[:64])) for row in rows]
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise DataError(f"{folder / FILE} is no table of digits; pip install --force-reinstall {NAME}") from error
    return scans


class DigitsSource:
    """Pictures of handwritten digits (``drawn.Source``)."""

    rows_per_unit: ClassVar[Mapping[str, float]] = {"train": 4.9, "test": 4.9}

    def __init__(self, folder: Path, seed: int) -> None:
        self._seed = seed
        scans = read_scans(folder)
        self._scans = {
            "train": [scan for number, scan in enumerate(scans) if number % TEST_EVERY],
            "test": scans[::TEST_EVERY],
        }

    def unit(self, split: str, number: int) -> list[Drawn]:
        """One picture with up to five questions."""
        rng = random.Random(f"{self._seed}/world/digits/{split}/{number}")
        scene = compose(rng, self._scans[split])
        questions = ask(rng, scene, KINDS[scene.layout], NUM_QUESTIONS)
        return [Drawn((draw(scene),), ".jpg", tuple(questions), describe(scene))]


def compose(rng: random.Random, scans: list[Scan]) -> DigitScene:
    """Dark on light or light on dark."""
    layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    columns = {"single": 1, "grid_2": 2, "grid_3": 3}.get(layout) or rng.randint(2, 5)
    count = columns if layout in ("single", "number") else columns * columns
    ground, ink = light(rng), COLORS[rng.choice(_DARK)]
    if rng.random() < 0.3:
        ground, ink = (rng.randint(0, 40), rng.randint(0, 40), rng.randint(0, 40)), light(rng)
    return DigitScene(layout, ground, ink, columns, tuple(rng.choice(scans) for _ in range(count)))


def draw(scene: DigitScene) -> bytes:
    """The scene as a JPEG of 192 x 192 pixels."""
    collage = Collage(SIDE_PX, Ground("plain", scene.ground, scene.ground))
    cell, rows = SIDE_PX / scene.columns, len(scene.scans) // scene.columns
    for place, scan in enumerate(scene.scans):
        x = (place % scene.columns + 0.5) * cell
        y = SIDE_PX / 2 if rows == 1 else (place // scene.columns + 0.5) * cell
        collage.paste(gray_cutout(scan.coverage, 8, scene.ink), Pasted((x, y), round(0.86 * min(cell, 150))))
    return collage.jpeg()


def describe(scene: DigitScene) -> str:
    """What is written, row by row."""
    values = [str(value) for value in scene.values]
    if scene.layout in ("single", "number"):
        return f"The handwritten {'digit' if len(values) == 1 else 'number'} {''.join(values)}."
    rows = [" ".join(values[start : start + scene.columns]) for start in range(0, len(values), scene.columns)]
    return f"Handwritten digits. {'. '.join(rows)}."


def _digits(wrong: int) -> tuple[str, ...]:
    return tuple(str(value) for value in range(10) if value != wrong)


def _read(rng: random.Random, scene: DigitScene) -> Asked:
    if scene.layout == "single":
        return Asked("Which digit is this?", str(scene.values[0]), _digits(scene.values[0]))
    number = "".join(map(str, scene.values))
    wrong: set[str] = set()
    while len(wrong) < 3:
        place, value = rng.randrange(len(number)), str(rng.randrange(10))
        if value != number[place]:
            wrong.add(number[:place] + value + number[place + 1 :])
    return Asked("Which number is written?", number, tuple(sorted(wrong)))


def _parity(rng: random.Random, scene: DigitScene) -> Asked:
    words = rng.choice(("even", "odd"))
    thing = "digit" if scene.layout == "single" else "number"
    return Asked(f"Is the {thing} {words}?", said((scene.values[-1] % 2 == 0) == (words == "even")))


def _is_above(rng: random.Random, scene: DigitScene) -> Asked:
    value, limit = scene.values[0], rng.randint(3, 6)
    return Asked(f"Is the digit larger than {limit}?", said(value > limit))


def _at(rng: random.Random, scene: DigitScene) -> Asked:
    if scene.layout == "number":
        place = rng.choice((0, len(scene.values) - 1))
        return Asked(
            f"What is the {'last' if place else 'first'} digit?", str(scene.values[place]), _digits(scene.values[place])
        )
    places = PLACES_2 if scene.columns == 2 else PLACES_3
    row, column = rng.choice(list(places))
    value = scene.values[row * scene.columns + column]
    return Asked(f"Which digit is in the {places[row, column]}?", str(value), _digits(value))


def _extreme(rng: random.Random, scene: DigitScene) -> Asked:
    words, choose = rng.choice((("largest", max), ("smallest", min)))
    value = choose(scene.values)
    return Asked(f"What is the {words} digit?", str(value), tuple(str(v) for v in set(scene.values) if v != value))


def _sum(rng: random.Random, scene: DigitScene) -> Asked:
    if scene.layout == "number":
        total, text = sum(scene.values), "What is the sum of the digits?"
    else:
        row = rng.randrange(scene.columns)
        total = sum(scene.values[row * scene.columns : (row + 1) * scene.columns])
        text = f"What is the sum of row {row + 1}?"
    return Asked(text, str(total), tuple(str(total + more) for more in (-3, -2, -1, 1, 2, 3) if total + more >= 0))


def _count(rng: random.Random, scene: DigitScene) -> Asked:
    number = rng.choice(sorted({scene.values.count(value) for value in range(10)}))
    value = rng.choice([value for value in range(10) if scene.values.count(value) == number])
    return Asked(f"How many times does {value} appear?", str(number), tuple(str(n) for n in range(5) if n != number))


def _exists(rng: random.Random, scene: DigitScene) -> Asked:
    shown, absent = sorted(set(scene.values)), [value for value in range(10) if value not in scene.values]
    if rng.random() < 0.5 or not absent:
        return Asked(f"Is there a {rng.choice(shown)}?", "yes")
    return Asked(f"Is there a {rng.choice(absent)}?", "no")


_GRID: dict[str, Kind[DigitScene]] = {
    "scan_at": _at,
    "scan_extreme": _extreme,
    "scan_sum": _sum,
    "scan_count": _count,
    "scan_exists": _exists,
}
KINDS: dict[str, dict[str, Kind[DigitScene]]] = {
    # layout: kinds
    "single": {"scan_read": _read, "scan_parity": _parity, "scan_above": _is_above},
    "number": {"scan_read": _read, "scan_at": _at, "scan_sum": _sum, "scan_parity": _parity, "scan_exists": _exists},
    "grid_2": _GRID,
    "grid_3": _GRID,
}  # fmt: skip
