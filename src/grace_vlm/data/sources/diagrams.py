"""Diagrams of nodes and arrows: following one arrow, following two, and counting those that arrive.

Nodes stand on a circle, so that an arrow never passes through a third one. Each node has at most one outgoing arrow,
so that "the node that A points to" is one node. Two arrows between the same two nodes lie on one line with two heads.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from grace_vlm.data.sources.grids import SIDE_PX, light
from grace_vlm.data.sources.questions import Candidate, Kinds
from grace_vlm.media.canvas import COLORS, Canvas, Point, Rgb

NODE_PX = 13.0
INK = (60, 60, 60)
DARK = ("black", "blue", "brown", "gray", "red", "teal")


@dataclass(frozen=True)
class Node:
    """A letter, its colour, its place, and the letter that its arrow points to."""

    letter: str
    color: str
    center: Point
    target: str | None


@dataclass(frozen=True)
class Diagram:
    """Nodes in the order of their letters."""

    background: Rgb
    nodes: tuple[Node, ...]

    def next(self) -> dict[str, str]:
        """Letter -> letter for every arrow."""
        return {node.letter: node.target for node in self.nodes if node.target is not None}


def compose(rng: random.Random) -> Diagram:
    """Four nodes of different colours, about three in four with an arrow."""
    letters = "ABCD"
    colors = rng.sample(sorted(COLORS), len(letters))
    places = rng.sample(range(len(letters)), len(letters))

    def node(letter: str, color: str, place: int) -> Node:
        angle = 2 * math.pi * (0.5 + place + rng.uniform(-0.04, 0.04)) / len(letters)
        radius = rng.uniform(46.0, 49.0)
        center = (SIDE_PX / 2 + radius * math.cos(angle), SIDE_PX / 2 + radius * math.sin(angle))
        target = rng.choice(letters.replace(letter, "")) if rng.random() < 0.78 else None
        return Node(letter, color, center, target)

    nodes = tuple(node(*parts) for parts in zip(letters, colors, places, strict=True))
    return Diagram(light(rng), nodes)


def draw(diagram: Diagram) -> bytes:
    """The diagram as a PNG of 128 x 128 pixels."""
    canvas = Canvas(SIDE_PX, diagram.background)
    centers = {node.letter: node.center for node in diagram.nodes}
    for letter, target in diagram.next().items():
        (x_1, y_1), (x_2, y_2) = centers[letter], centers[target]
        edge = NODE_PX / math.hypot(x_2 - x_1, y_2 - y_1)
        dx, dy = edge * (x_2 - x_1), edge * (y_2 - y_1)
        canvas.arrow((x_1 + dx, y_1 + dy), (x_2 - dx, y_2 - dy), INK)
    for node in diagram.nodes:
        canvas.disc(node.center, NODE_PX - 1, COLORS[node.color])
        ink = (255, 255, 255) if node.color in DARK else (0, 0, 0)
        canvas.text(node.center, node.letter, 16, ink)
    return canvas.png()


def following(diagram: Diagram) -> list[Candidate]:
    """The letter that one arrow points to."""
    return [(f"which node does {letter} point to?", target) for letter, target in diagram.next().items()]


def edge(diagram: Diagram) -> list[Candidate]:
    """Whether there is an arrow, in this direction."""
    arrows = diagram.next()
    letters = [node.letter for node in diagram.nodes]
    return [
        (f"does {first} point to {second}?", "yes" if arrows.get(first) == second else "no")
        for first in letters
        for second in letters
        if first != second
    ]


def hop(diagram: Diagram) -> list[Candidate]:
    """Where two arrows lead; possibly back."""
    arrows = diagram.next()
    return [
        (f"starting at {letter}, which node is two arrows away?", arrows[target])
        for letter, target in arrows.items()
        if target in arrows
    ]


def color(diagram: Diagram) -> list[Candidate]:
    """The colour of the node at an arrow's end."""
    colors = {node.letter: node.color for node in diagram.nodes}
    return [(f"what color is the node {a} points to?", colors[b]) for a, b in diagram.next().items()]


def incoming(diagram: Diagram) -> list[Candidate]:
    """How many arrows arrive at a node."""
    targets = list(diagram.next().values())
    return [(f"how many arrows point to {node.letter}?", str(targets.count(node.letter))) for node in diagram.nodes]


def describe(diagram: Diagram) -> str:
    """Every node with its colour and the node that it points to."""
    return ", ".join(f"{n.letter} {n.color} to {n.target or 'none'}" for n in diagram.nodes)


KINDS: Kinds[Diagram] = {
    "diagram_next": following,
    "diagram_edge": edge,
    "diagram_hop": hop,
    "diagram_color": color,
    "diagram_in": incoming,
}
