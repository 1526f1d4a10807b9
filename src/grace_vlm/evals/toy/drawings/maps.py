"""Maps of six coloured regions in three rows and two columns, north at the top."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas

NUM_ROWS, NUM_COLUMNS = 3, 2
STEPS = {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}
CORNERS = {"northwest": (0, 0), "northeast": (0, 1), "southwest": (2, 0), "southeast": (2, 1)}
SEA, LAND_PX = (235, 245, 255), 104
INK = (40, 40, 40)


@dataclass(frozen=True)
class Map:
    """``regions[row][column]`` is a colour; no colour twice. Borders are pixels."""

    regions: tuple[tuple[str, ...], ...]
    row_borders: tuple[int, ...]
    column_borders: tuple[int, ...]


def compose(rng: random.Random) -> Map:
    """Borders that leave every region at least 20 pixels."""
    colors = rng.sample(sorted(COLORS), NUM_ROWS * NUM_COLUMNS)
    rows = (4, rng.randint(32, 44), rng.randint(70, 88), SIDE_PX - 5)
    columns = (4, rng.randint(40, 70), LAND_PX)
    regions = tuple(tuple(colors[row * NUM_COLUMNS : (row + 1) * NUM_COLUMNS]) for row in range(NUM_ROWS))
    return Map(regions, rows, columns)


def draw(chart: Map) -> bytes:
    """The map as a PNG of 128 x 128 pixels, sea around it and an arrow to the north at its right."""
    canvas = Canvas(SIDE_PX, SEA)
    for row, line in enumerate(chart.regions):
        for column, color in enumerate(line):
            left, right = chart.column_borders[column : column + 2]
            top, bottom = chart.row_borders[row : row + 2]
            canvas.box(left, top, right - 1, bottom - 1, COLORS[color])
            canvas.line((left, bottom), (right, bottom), SEA, width_px=2)
            canvas.line((right, top), (right, bottom), SEA, width_px=2)
    canvas.arrow((116, 52), (116, 24), INK)
    canvas.text((116, 14), "N", 14, INK)
    return canvas.png()


def neighbor(chart: Map) -> list[Candidate]:
    """The region next to one, by direction."""
    found: list[Candidate] = []
    for row, line in enumerate(chart.regions):
        for column, color in enumerate(line):
            for direction, (down, right) in STEPS.items():
                if 0 <= row + down < NUM_ROWS and 0 <= column + right < NUM_COLUMNS:
                    beside = chart.regions[row + down][column + right]
                    found.append((f"what color is the region directly {direction} of the {color} region?", beside))
    return found


def corner(chart: Map) -> list[Candidate]:
    """The regions in the corners."""
    return [
        (f"what color is the region in the {name}?", chart.regions[row][column])
        for name, (row, column) in CORNERS.items()
    ]


def describe(chart: Map) -> str:
    """Every region, from north to south, west to east."""
    return ". ".join(", ".join(line) for line in chart.regions)


KINDS: Kinds[Map] = {"map_neighbor": neighbor, "map_corner": corner}
