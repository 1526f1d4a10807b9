"""Scenes that the pixel oracle does not read: every candidate recomputed from the scene by another route."""

from __future__ import annotations

import io
import itertools
import random
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grace_vlm.evals.toy.drawings import chains, flags, labels, lamps, tables
from grace_vlm.evals.toy.rooms import ROOMS
from grace_vlm.media.canvas import COLORS

SEEDS = range(40)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def label_answer(diagram: labels.Labels, question: str) -> Any:
    """A place for a question about a label, else the answer's text."""
    corners = ["top left", "top right", "bottom left", "bottom right"]
    found = re.search("(?:is|disc) at the (.+)\\?", question)
    place = corners.index(found[1]) if found else None
    if found := re.search("the (\\w+) disc points to", question):
        place = diagram.targets[diagram.colors.index(found[1])]
    elif found := re.search("label of the (\\w+) disc", question):
        place = diagram.colors.index(found[1])
    if question.startswith("how many"):
        if found := re.search("point to the (\\w+) disc", question):
            return str(sum(target == diagram.colors.index(found[1]) for target in diagram.targets))
        return str(sum(target is not None for target in diagram.targets))
    return diagram.colors[place] if question.startswith("what color") else place


def test_labels_are_answered_from_the_scene() -> None:
    num_checked = 0
    for seed in SEEDS:
        diagram = labels.compose(random.Random(seed))
        assert len(set(diagram.colors)) == len(set(diagram.names)) == len(set(diagram.letters)) == 4
        for listing in (labels.label_questions, labels.color_questions, labels.count_questions):
            for question, answer in listing(diagram):
                assert label_answer(diagram, question) == answer, question
                num_checked += 1
    assert num_checked > 500


def test_masking_changes_the_labels_and_nothing_else() -> None:
    diagram = labels.compose(random.Random(0))
    masked, unmasked = (pixels(labels.draw(diagram, is_masked)) for is_masked in (True, False))
    changed = (masked != unmasked).any(-1)
    boxes = np.zeros_like(changed)
    for (x, y), side in zip(labels.CENTERS, (-27, -27, 27, 27), strict=True):
        boxes[y + side - 8 : y + side + 9, x - 22 : x + 23] = True
    assert changed.any()
    assert not (changed & ~boxes).any()


def test_chains_are_answered_from_their_members() -> None:
    for seed in SEEDS:
        chain = chains.compose(random.Random(seed))
        assert 3 <= len(chain.members) == len(set(chain.members))
        text = " ".join(next(" ".join(one) for one in chains.CHAINS if chain.members[0] in one).split())
        assert " ".join(chain.members) in text
        for kind, listing in chains.KINDS.items():
            for question, answer in listing(chain):
                place = chain.members.index(answer)
                if kind == "chain_ends":
                    assert place == (0 if "start" in question else len(chain.members) - 1)
                else:
                    asked = re.search("(?:eats|does) the (.+?)(?: eat)?\\?", question)[1]
                    assert place - chain.members.index(asked) == (1 if kind == "chain_eater" else -1)


def test_nobody_eats_two_things_in_our_chains() -> None:
    """Or a wrong option from another chain could be right."""
    meals = [pair for chain in chains.CHAINS for pair in itertools.pairwise(chain)]
    assert len(meals) == len({food for food, _ in meals}) == len({eater for _, eater in meals}) == 31


def test_tables_and_their_bars() -> None:
    for seed in SEEDS:
        table = tables.compose(random.Random(seed))
        values = dict(table.rows)
        assert len(set(values.values())) == len(table.rows) == len(values)
        for question, answer in tables.value(table):
            assert answer == str(values[question.split()[2]])
        for question, answer in tables.extreme(table):
            assert values[answer] == (max if "most" in question else min)(values.values())
        for question, answer in tables.total(table):
            words = question.split()
            assert answer == str(values[words[2]] + values[words[4]])
        teal = (pixels(tables.draw_bars(table)) == COLORS["teal"]).all(-1)
        columns = np.nonzero(teal.any(0))[0]
        starts = [x for x in columns if x - 1 not in columns]
        assert [(int(teal[:, x].sum()) - 1) // 7 for x in starts] == list(values.values())


def test_flags_all_differ() -> None:
    assert len(set(flags.FLAGS.values())) == len(flags.FLAGS) == 14


def test_lamps_by_hand() -> None:
    scene = lamps.Lamps((255, 255, 255), (("red", True), ("blue", False), ("teal", True)))
    assert dict(lamps.count(scene)) == {"how many lamps are on?": "2", "how many lamps are off?": "1"}
    assert [answer for _, answer in lamps.is_on(scene)] == ["yes", "no", "yes"]


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_the_same_random_state_gives_the_same_picture_and_questions(name: str) -> None:
    room = ROOMS[name]

    def make() -> Any:
        return room.compose(random.Random(5))

    assert make() == make()
    assert room.draw(make()) == room.draw(make())
    others = {room.draw(room.compose(random.Random(seed))) for seed in SEEDS}
    assert len(others) > 25, "scenes that are told apart"
    for kind, listing in room.kinds.items():
        for _, answer in listing(make()):
            wrong = room.wrong(kind, answer)
            assert answer not in wrong
            assert len(wrong) == len(set(wrong))
