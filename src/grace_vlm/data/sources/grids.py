"""Grids of coloured shapes: counting, looking up, comparing and spatial relations.

A grid is 2 x 2 (a mosaic of easy-VQA's own pictures) or 4 x 4 (drawn here, some cells empty). Rows and columns
count from 1 at the top left. A picture uses few colours and shapes, so that counts above 1 are common.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, SHAPES, Canvas, Point, Rgb
from grace_vlm.media.image import load_image

SIDE_PX = 128
RULE = (205, 205, 205)
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Cell:
    """One shape: what it is, and how it is drawn (``tile`` names a picture that is pasted instead)."""

    color: str
    shape: str
    center: Point = (0.0, 0.0)
    radius: float = 0.0
    tile: Path | None = None

    @property
    def name(self) -> str:
        """As questions call it: ``red circle``."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Grid:
    """``cells[row][column]``; None is an empty cell."""

    background: Rgb
    cells: tuple[tuple[Cell | None, ...], ...]

    def filled(self) -> Iterator[tuple[int, int, Cell]]:
        """(row, column, cell) of the shapes, row by row, 0-based."""
        for row, line in enumerate(self.cells):
            for column, cell in enumerate(line):
                if cell is not None:
                    yield row, column, cell

    def unique(self) -> dict[str, tuple[int, int]]:
        """Where each shape stands whose colour and shape occur once."""
        counts = Counter(cell.name for _, _, cell in self.filled())
        return {cell.name: (row, column) for row, column, cell in self.filled() if counts[cell.name] == 1}


def compose(rng: random.Random) -> Grid:
    """A grid of 4 x 4 shapes of 3 to 5 colours and 3 kinds."""
    num_cells = 4
    cell_px = SIDE_PX / num_cells
    colors = rng.sample(sorted(COLORS), rng.choice((3, 4, 5)))
    shapes = rng.sample(SHAPES, 3)

    def cell(row: int, column: int) -> Cell | None:
        if rng.random() < 0.12:
            return None
        radius = cell_px * rng.uniform(0.35, 0.42)
        slack = 0.4 * (cell_px / 2 - radius - 1)
        center = tuple((at + 0.5) * cell_px + rng.uniform(-slack, slack) for at in (column, row))
        return Cell(rng.choice(colors), rng.choice(shapes), (center[0], center[1]), radius)

    background = light(rng)
    return Grid(background, tuple(tuple(cell(row, column) for column in range(num_cells)) for row in range(num_cells)))


def compose_mosaic(rng: random.Random, tiles: Sequence[Cell]) -> Grid:
    """Four of easy-VQA's pictures, 2 x 2."""
    chosen = rng.sample(tiles, 4)
    return Grid((255, 255, 255), ((chosen[0], chosen[1]), (chosen[2], chosen[3])))


def light(rng: random.Random) -> Rgb:
    """A background that none of the eight colours can be mistaken for."""
    return rng.randint(232, 255), rng.randint(232, 255), rng.randint(232, 255)


def draw(grid: Grid) -> bytes:
    """The grid as a PNG of 128 x 128 pixels, ruled so that rows and columns count themselves."""
    canvas = Canvas(SIDE_PX, grid.background)
    for border in range(1, len(grid.cells)):
        at = border * SIDE_PX / len(grid.cells)
        canvas.line((at, 0), (at, SIDE_PX), RULE)
        canvas.line((0, at), (SIDE_PX, at), RULE)
    for row, column, cell in grid.filled():
        if cell.tile is None:
            canvas.shape(cell.shape, cell.center, cell.radius, COLORS[cell.color])
        else:
            canvas.paste(load_image(cell.tile).image, column * SIDE_PX // 2, row * SIDE_PX // 2)
    return canvas.png()


def plural(shape: str) -> str:
    """``circle`` -> ``circles``; ``cross`` -> ``crosses``."""
    return shape + ("es" if shape.endswith("s") else "s")


def groups(grid: Grid) -> dict[str, int]:
    """How many of each colour and of each shape: ``red shapes`` -> 3, ``circles`` -> 5."""
    counts: Counter[str] = Counter()
    for _, _, cell in grid.filled():
        counts.update((f"{cell.color} shapes", plural(cell.shape)))
    return counts


def count_shape(grid: Grid) -> list[Candidate]:
    """How many of one colour or of one shape; those that occur."""
    return [(f"how many {group} are there?", str(count)) for group, count in groups(grid).items()]


def count_both(grid: Grid) -> list[Candidate]:
    """How many of one colour and shape; also none, when each of the two words occurs."""
    counts = Counter(cell.name for _, _, cell in grid.filled())
    return [(f"how many {plural(name)} are there?", str(counts[name])) for name in _names(grid)]


def exists(grid: Grid) -> list[Candidate]:
    """Is a colour and shape there at all."""
    names = {cell.name for _, _, cell in grid.filled()}
    return [(f"is there a {name}?", "yes" if name in names else "no") for name in _names(grid)]


def _names(grid: Grid) -> list[str]:
    colors = sorted({cell.color for _, _, cell in grid.filled()})
    shapes = sorted({cell.shape for _, _, cell in grid.filled()})
    return [f"{color} {shape}" for color in colors for shape in shapes]


def color_at(grid: Grid) -> list[Candidate]:
    """The colour in a row and column."""
    return [(f"what color is the shape in row {r + 1}, column {c + 1}?", cell.color) for r, c, cell in grid.filled()]


def shape_at(grid: Grid) -> list[Candidate]:
    """The shape in a row and column."""
    return [(f"what shape is in row {r + 1}, column {c + 1}?", cell.shape) for r, c, cell in grid.filled()]


def compare(grid: Grid) -> list[Candidate]:
    """Two counts against each other, of two colours or of two shapes; equal counts are a no."""
    counts = groups(grid)
    return [
        (f"are there more {first} than {second}?", "yes" if counts[first] > counts[second] else "no")
        for first in counts
        for second in counts
        if first != second and first.endswith(" shapes") == second.endswith(" shapes")
    ]


def relation(grid: Grid) -> list[Candidate]:
    """Left, right, above, below, between two shapes that occur once and differ along that axis."""
    found: list[Candidate] = []
    places = grid.unique()
    for first, (row_1, column_1) in places.items():
        for second, (row_2, column_2) in places.items():
            for direction, (row_step, column_step) in DIRECTIONS.items():
                offset = (row_1 - row_2) * row_step + (column_1 - column_2) * column_step
                if offset:
                    found.append((f"is the {first} {direction} the {second}?", "yes" if offset > 0 else "no"))
    return found


def neighbor(grid: Grid) -> list[Candidate]:
    """Colour or shape of the one directly beside a shape that occurs once: find, step, look."""
    found: list[Candidate] = []
    side = len(grid.cells)
    for name, (row, column) in grid.unique().items():
        for direction, (row_step, column_step) in DIRECTIONS.items():
            r, c = row + row_step, column + column_step
            beside = grid.cells[r][c] if 0 <= r < side and 0 <= c < side else None
            if beside is not None:
                found.append((f"what color is the shape directly {direction} the {name}?", beside.color))
                found.append((f"what shape is directly {direction} the {name}?", beside.shape))
    return found


def describe(grid: Grid) -> str:
    """Every cell, row by row."""
    return ". ".join(", ".join(cell.name if cell else "empty" for cell in line) for line in grid.cells)


KINDS: Kinds[Grid] = {
    "scene_count_shape": count_shape,
    "scene_count_both": count_both,
    "scene_exists": exists,
    "scene_color_at": color_at,
    "scene_shape_at": shape_at,
    "scene_compare": compare,
    "scene_relation": relation,
    "scene_neighbor": neighbor,
}
