"""Food chains: arrows lead from what is eaten to who eats it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import Canvas, Rgb

CHAINS = (
    ("grass", "grasshopper", "frog", "snake", "hawk"),
    ("algae", "shrimp", "fish", "seal", "shark"),
    ("leaf", "caterpillar", "robin", "cat"),
    ("wheat", "mouse", "weasel", "owl"),
    ("clover", "rabbit", "fox", "eagle"),
    ("plankton", "krill", "penguin", "leopard seal"),
    ("nectar", "butterfly", "spider", "sparrow", "falcon"),
    ("acorn", "squirrel", "marten"),
    ("moss", "reindeer", "wolf"),
    ("seaweed", "sea urchin", "otter", "orca"),
)
MEMBERS = tuple(sorted({member for chain in CHAINS for member in chain}))
INK, BOX = (50, 50, 50), (255, 255, 255)


@dataclass(frozen=True)
class Chain:
    """At least three members, from what is eaten first."""

    background: Rgb
    members: tuple[str, ...]


def compose(rng: random.Random) -> Chain:
    """Three to five neighbours of a real chain."""
    chain = rng.choice(CHAINS)
    length = rng.randint(3, len(chain))
    start = rng.randint(0, len(chain) - length)
    return Chain(light(rng), chain[start : start + length])


def draw(chain: Chain) -> bytes:
    """The chain as a PNG of 128 x 128 pixels, from the top down."""
    canvas = Canvas(SIDE_PX, chain.background)
    step = SIDE_PX / len(chain.members)
    for place, member in enumerate(chain.members):
        y = (place + 0.5) * step
        canvas.box(22, y - 8, SIDE_PX - 22, y + 8, BOX)
        canvas.text((SIDE_PX / 2, y), member, 13, INK)
        if place:
            canvas.arrow((SIDE_PX / 2, y - step + 8), (SIDE_PX / 2, y - 8), INK, head_px=6)
    return canvas.png()


def eater(chain: Chain) -> list[Candidate]:
    """Who eats a member."""
    return [
        (f"in this food chain, what eats the {a}?", b) for a, b in zip(chain.members, chain.members[1:], strict=False)
    ]


def eaten(chain: Chain) -> list[Candidate]:
    """What a member eats."""
    return [
        (f"in this food chain, what does the {b} eat?", a)
        for a, b in zip(chain.members, chain.members[1:], strict=False)
    ]


def ends(chain: Chain) -> list[Candidate]:
    """Where the chain begins and ends."""
    return [
        ("which is at the start of this food chain?", chain.members[0]),
        ("which is at the end of this food chain?", chain.members[-1]),
    ]


def describe(chain: Chain) -> str:
    """The chain in words."""
    return "A food chain: " + " -> ".join(chain.members) + ". An arrow points to the one that eats"


KINDS: Kinds[Chain] = {"chain_eater": eater, "chain_eaten": eaten, "chain_ends": ends}
