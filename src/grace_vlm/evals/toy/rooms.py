"""Every kind of picture that the suite asks about, by name: the demo's own scenes and those of ``drawings``.

The demo's toy student and teacher were trained on grids, charts, digits and diagrams, so questions about those are
the ones on which they score. The suite composes its own pictures of them from seeds of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grace_vlm.data.sources import charts, diagrams, digits, grids
from grace_vlm.data.sources.questions import Candidate, Kinds, wrong_answers
from grace_vlm.evals.toy.drawings import (
    chains,
    faces,
    flags,
    illusions,
    lamps,
    maps,
    patterns,
    polygons,
    sequences,
    tables,
)

Scene = Any
"""One room's own frozen dataclass."""


@dataclass(frozen=True)
class Room:
    """How one kind of scene is composed, drawn, asked about and told in words.

    ``words``: by kind, all that is ever an answer, and so the wrong options of each other. A kind that is not there
    has answers of which ``wrong_answers`` knows others: colours, shapes, numbers.
    ``offers_shown``: wrong options are first those that the scene shows, or looking for a known word would do.
    """

    compose: Callable[[random.Random], Scene]
    draw: Callable[[Scene], bytes]
    kinds: Kinds[Scene]
    describe: Callable[[Scene], str]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    offers_shown: bool = False

    def wrong(self, kind: str, answer: str) -> list[str]:
        """Other answers of the same sort."""
        if answer in ("yes", "no"):
            return ["no" if answer == "yes" else "yes"]
        if kind in self.words:
            return [word for word in self.words[kind] if word != answer]
        return wrong_answers(answer)


def positions(grid: grids.Grid) -> list[Candidate]:
    """Where a shape stands that occurs once."""
    return [(f"where is the {name}?", f"row {r + 1}, column {c + 1}") for name, (r, c) in grid.unique().items()]


def directions(grid: grids.Grid) -> list[Candidate]:
    """Where one shape is from another of the same row or column; both occur once."""
    found: list[Candidate] = []
    places = grid.unique()
    for first, (row_1, column_1) in places.items():
        for second, (row_2, column_2) in places.items():
            for direction, (down, right) in grids.DIRECTIONS.items():
                straight = column_1 == column_2 if down else row_1 == row_2
                if straight and (row_1 - row_2) * down + (column_1 - column_2) * right > 0:
                    found.append((f"where is the {first}, seen from the {second}?", direction))
    return found


def contents(word: str) -> Callable[[Scene], list[Candidate]]:
    """What there is to see at all, of pictures that all have the same."""
    return lambda scene: [("which of these is in the picture?", word)]


_CONTENTS = {"contents": ("bars", "digits", "nodes and arrows", "shapes", "faces", "a map", "a flag")}
_PLACES = tuple(f"row {row}, column {column}" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4))
_DIGITS = tuple("0123456789")

ROOMS: dict[str, Room] = {
    "grids": Room(
        grids.compose,
        grids.draw,
        {**grids.KINDS, "position": positions, "direction": directions, "contents": contents("shapes")},
        grids.describe,
        {**_CONTENTS, "position": _PLACES, "direction": tuple(grids.DIRECTIONS)},
    ),
    "charts": Room(
        charts.compose, charts.draw, {**charts.KINDS, "contents": contents("bars")}, charts.describe, _CONTENTS
    ),
    "digits": Room(
        digits.compose,
        digits.draw,
        {**digits.KINDS, "contents": contents("digits")},
        digits.describe,
        {**_CONTENTS, "digit_at": _DIGITS, "digit_max": _DIGITS},
    ),
    "diagrams": Room(
        diagrams.compose,
        diagrams.draw,
        {**diagrams.KINDS, "contents": contents("nodes and arrows")},
        diagrams.describe,
        _CONTENTS,
    ),
    "chains": Room(
        chains.compose, chains.draw, chains.KINDS, chains.describe, dict.fromkeys(chains.KINDS, chains.MEMBERS), True
    ),
    "faces": Room(faces.compose, faces.draw, faces.KINDS, faces.describe, {"face_mood": faces.MOODS}),
    "flags": Room(flags.compose, flags.draw, flags.KINDS, flags.describe, {"flag_country": tuple(flags.FLAGS)}),
    "illusions": Room(illusions.compose, illusions.draw, illusions.KINDS, illusions.describe),
    "lamps": Room(lamps.compose, lamps.draw, lamps.KINDS, lamps.describe),
    "maps": Room(maps.compose, maps.draw, maps.KINDS, maps.describe),
    "patterns": Room(
        patterns.compose, patterns.draw, patterns.KINDS, patterns.describe, {"pattern_name": patterns.PATTERNS}
    ),
    "polygons": Room(polygons.compose, polygons.draw, polygons.KINDS, polygons.describe),
    "sequences": Room(sequences.compose, sequences.draw, sequences.KINDS, sequences.describe),
    "tables": Room(tables.compose, tables.draw, tables.KINDS, tables.describe, {"table_extreme": tables.NAMES}, True),
}
