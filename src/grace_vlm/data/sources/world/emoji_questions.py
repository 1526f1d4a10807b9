"""What is asked about compositions of emoji. A kind returns None where the scene gives it nothing to ask."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from grace_vlm.data.sources.world.drawn import Asked, Kind, said
from grace_vlm.data.sources.world.emoji import Emoji
from grace_vlm.data.sources.world.emoji_scenes import Dealer, EmojiScene
from grace_vlm.data.sources.world.emoji_words import GROUPS, SUBCATEGORIES, many, one
from grace_vlm.data.sources.world.grounds import GROUND_COLORS

FINER = {
    group: tuple(sorted({finer for kind, finer in SUBCATEGORIES.values() if kind == group and finer}))
    for group in GROUPS
}
PLACES_2 = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
PLACES_3 = {
    (row, column): "center" if row == column == 1 else f"{high} {wide}"
    for row, high in enumerate(("top", "middle", "bottom"))
    for column, wide in enumerate(("left", "center", "right"))
}
PLACES_PAIR = {(0, 0): "left", (0, 1): "right"}
NUM_NEAR = 5
_FREQUENT = ("mammal", "smiley", "land vehicle", "hand", "sport")
"""Finer sorts that most of their sort are of; they are asked about less often than the others."""


@dataclass(frozen=True)
class Shown:
    """A scene, and the dealer who knows what else there is."""

    scene: EmojiScene
    dealer: Dealer

    def thing(self, name: str) -> Emoji:
        """What a name means."""
        return self.dealer.things[name]

    def places(self) -> Mapping[tuple[int, int], str]:
        """The words for the scene's cells, where it has few."""
        sides = (len(self.scene.cells), len(self.scene.cells[0]))
        return {(1, 2): PLACES_PAIR, (2, 2): PLACES_2, (3, 3): PLACES_3}.get(sides, {})


def wrong_names(rng: random.Random, shown: Shown, name: str) -> tuple[str, ...]:
    """Names of the same sort, and, where it has others, of things that the scene shows."""
    near = shown.dealer.others(name, same_group=True)
    found = rng.sample(near, min(len(near), NUM_NEAR))
    if len(found) < 3:
        far = shown.dealer.others(name, same_group=False)
        found += rng.sample(far, min(len(far), NUM_NEAR - len(found)))
    return tuple(found)


def _name(rng: random.Random, shown: Shown) -> Asked:
    (name,) = shown.scene.names()
    text = rng.choice(("What is this?", "What does the picture show?", "What is shown in the picture?"))
    return Asked(text, name, wrong_names(rng, shown, name))


def _sort(rng: random.Random, shown: Shown) -> Asked | None:
    (name,) = shown.scene.names()
    group = shown.thing(name).group
    if group == "other":
        return None
    return Asked(
        "What kind of thing is shown?", group, tuple(other for other in GROUPS if other not in (group, "other"))
    )


def _finer(rng: random.Random, shown: Shown) -> Asked | None:
    (name,) = shown.scene.names()
    thing = shown.thing(name)
    if thing.finer is None or len(FINER[thing.group]) < 2:
        return None
    if thing.finer in _FREQUENT and rng.random() < 0.6:
        return None
    return Asked(f"What kind of {thing.group} is this?", thing.finer, FINER[thing.group])


def _is_it(rng: random.Random, shown: Shown) -> Asked:
    (name,) = shown.scene.names()
    if rng.random() < 0.5:
        return Asked(f"Is this a picture of {one(name)}?", "yes")
    other = rng.choice(wrong_names(rng, shown, name))
    return Asked(f"Is this a picture of {one(other)}?", "no")


def _is_sort(rng: random.Random, shown: Shown) -> Asked | None:
    (name,) = shown.scene.names()
    group = shown.thing(name).group
    if group == "other":
        return None
    if rng.random() < 0.5:
        return Asked(f"Does the picture show {one(group)}?", "yes")
    # As often as it is there: or a sort that is shown much would be a yes by its name alone.
    others = [name for name in GROUPS if name not in (group, "other")]
    other = rng.choices(others, [GROUPS[name][1] for name in others])[0]
    return Asked(f"Does the picture show {one(other)}?", "no")


def _ground(rng: random.Random, shown: Shown) -> Asked | None:
    color = shown.scene.ground_color
    return None if color is None else Asked("What color is the background?", color, tuple(GROUND_COLORS))


def _exists(rng: random.Random, shown: Shown) -> Asked:
    names = shown.scene.names()
    if rng.random() < 0.5:
        return Asked(f"Is there {one(rng.choice(names))} in the picture?", "yes")
    name = rng.choice(names)
    absent = [other for other in wrong_names(rng, shown, name) if other not in names]
    return Asked(f"Is there {one(rng.choice(absent))} in the picture?", "no")


def _at(rng: random.Random, shown: Shown) -> Asked:
    place, words = rng.choice(list(shown.places().items()))
    name = shown.scene.cells[place[0]][place[1]]
    assert name is not None
    where = f"on the {words}" if len(shown.places()) == 2 else f"in the {words}"
    here = tuple(other for other in shown.scene.names() if other != name)
    return Asked(f"What is {where}?", name, here if len(here) >= 2 else (*here, *wrong_names(rng, shown, name)))


def _where(rng: random.Random, shown: Shown) -> Asked | None:
    single = _single(shown)
    if not single:
        return None
    name = rng.choice(sorted(single))
    return Asked(f"Where is the {name}?", shown.places()[single[name]], tuple(shown.places().values()))


def _single(shown: Shown) -> dict[str, tuple[int, int]]:
    """Where each thing stands that is there once."""
    counts = Counter(shown.scene.names())
    return {
        name: (row, column)
        for row, line in enumerate(shown.scene.cells)
        for column, name in enumerate(line)
        if name is not None and counts[name] == 1
    }


def _beside(rng: random.Random, shown: Shown) -> Asked | None:
    cells = shown.scene.cells
    steps = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    found = [
        (f"What is directly {words} the {name}?", beside)
        for name, (row, column) in _single(shown).items()
        for words, (down, right) in steps.items()
        if 0 <= row + down < len(cells) and 0 <= column + right < len(cells[0])
        if (beside := cells[row + down][column + right]) is not None
    ]
    if not found:
        return None
    text, name = rng.choice(found)
    return Asked(text, name, tuple(other for other in shown.scene.names() if other != name))


def _relation(rng: random.Random, shown: Shown) -> Asked | None:
    single = _single(shown)
    if len(single) < 2:
        return None
    first, second = rng.sample(sorted(single), 2)
    (row_1, column_1), (row_2, column_2) = single[first], single[second]
    axis = rng.choice([one for one, differs in (("row", row_1 != row_2), ("column", column_1 != column_2)) if differs])
    is_before = row_1 < row_2 if axis == "row" else column_1 < column_2
    asks_before = is_before == (rng.random() < 0.5)
    words = {("row", True): "above", ("row", False): "below", ("column", True): "to the left of"}.get(
        (axis, asks_before), "to the right of"
    )
    return Asked(f"Is the {first} {words} the {second}?", said(is_before == asks_before))


def _count_sort(rng: random.Random, shown: Shown) -> Asked:
    """How many of a sort; also none. A number is drawn first, so that small ones are not all there is."""
    counts = Counter(shown.thing(name).group for name in shown.scene.names())
    sorts = [group for group in GROUPS if group != "other"]
    number = rng.choice(sorted({counts[group] for group in sorts}))
    group = rng.choice([group for group in sorts if counts[group] == number])
    return Asked(f"How many {GROUPS[group][0]} are there?", str(number), _near_numbers(number))


def _count(rng: random.Random, shown: Shown) -> Asked:
    names = shown.scene.names()
    name = rng.choice(sorted(set(names)))
    if rng.random() < 0.1:
        name = next((other for other in wrong_names(rng, shown, name) if other not in names), name)
    number = names.count(name)
    return Asked(f"How many {many(name)} are there?", str(number), _near_numbers(number))


def _count_all(rng: random.Random, shown: Shown) -> Asked:
    number = len(shown.scene.names())
    return Asked("How many things are in the picture?", str(number), _near_numbers(number))


def _near_numbers(number: int) -> tuple[str, ...]:
    return tuple(str(other) for other in range(max(0, number - 3), number + 4) if other != number)


def _more(rng: random.Random, shown: Shown) -> Asked | None:
    counts = Counter(shown.scene.names())
    pairs = [(a, b) for a in sorted(counts) for b in sorted(counts) if counts[a] != counts[b]]
    if not pairs:
        return None
    wants_yes = rng.random() < 0.5
    first, second = rng.choice([pair for pair in pairs if (counts[pair[0]] > counts[pair[1]]) == wants_yes])
    return Asked(f"Are there more {many(first)} than {many(second)}?", said(wants_yes))


def _odd(rng: random.Random, shown: Shown) -> Asked:
    groups = Counter(shown.thing(name).group for name in shown.scene.names())
    (name,) = [name for name in shown.scene.names() if groups[shown.thing(name).group] == 1]
    rest = tuple(other for other in shown.scene.names() if other != name)
    return Asked("Which one does not belong with the others?", name, rest)


def _shared(rng: random.Random, shown: Shown) -> Asked:
    groups = Counter(shown.thing(name).group for name in shown.scene.names())
    group = groups.most_common(1)[0][0]
    wrong = tuple(other for other in GROUPS if other not in (*groups, "other"))
    return Asked("What kind of thing are three of the four?", group, wrong)


def _same_sort(rng: random.Random, shown: Shown) -> Asked | None:
    first, second = (shown.thing(name).group for name in shown.scene.names())
    if "other" in (first, second):
        return None
    return Asked("Are both of the same kind of thing?", said(first == second))


_GRID: dict[str, Kind[Shown]] = {
    "emoji_at": _at,
    "emoji_where": _where,
    "emoji_beside": _beside,
    "emoji_exists": _exists,
    "emoji_relation": _relation,
    "emoji_count_sort": _count_sort,
}
KINDS: dict[str, dict[str, Kind[Shown]]] = {
    # layout: kinds
    "single": {
        "emoji_name": _name,
        "emoji_sort": _sort,
        "emoji_finer_sort": _finer,
        "emoji_is_it": _is_it,
        "emoji_is_sort": _is_sort,
        "emoji_ground": _ground,
    },
    "pair": {
        "emoji_at": _at,
        "emoji_exists": _exists,
        "emoji_relation": _relation,
        "emoji_where": _where,
        "emoji_same_sort": _same_sort,
        "emoji_ground": _ground,
    },
    "mosaic_2": _GRID,
    "mosaic_3": _GRID,
    "odd": {
        "emoji_odd": _odd,
        "emoji_shared_sort": _shared,
        "emoji_at": _at,
        "emoji_exists": _exists,
        "emoji_where": _where,
    },
    "scatter": {
        "emoji_count": _count,
        "emoji_count_all": _count_all,
        "emoji_more": _more,
        "emoji_exists": _exists,
        "emoji_count_sort": _count_sort,
    },
}


def describe(shown: Shown) -> str:
    """A sentence with all that is there."""
    scene, names = shown.scene, shown.scene.names()
    behind = "." if scene.ground_color is None else f" on a {scene.ground_color} background."
    behind = behind.replace(" a orange", " an orange")
    if scene.layout == "single":
        return f"{one(names[0])}{behind}"
    if scene.layout == "pair":
        return f"{one(names[0])} on the left and {one(names[1])} on the right{behind}"
    if scene.layout == "scatter":
        counts = Counter(names)
        parts = [one(name) if number == 1 else f"{number} {many(name)}" for name, number in sorted(counts.items())]
        return f"{' and '.join([', '.join(parts[:-1]), parts[-1]])}{behind}"
    rows = ["; ".join(name or "" for name in row) for row in scene.cells]
    words = ("Top", "Middle", "Bottom") if len(rows) == 3 else ("Top", "Bottom")
    return " ".join(f"{word}: {row}." for word, row in zip(words, rows, strict=True))
