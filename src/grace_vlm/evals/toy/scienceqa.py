"""ScienceQA's layout: problems and splits as JSON, a folder a picture; more than half of the problems have none.

    problems.json  pid_splits.json  images/<split>/<id>/image.png

A problem without a picture has the facts in its hint, so a prompt that loses the hint cannot be answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_vlm.evals.toy.deck import Deck, Item
from grace_vlm.evals.toy.layout import write_json, write_picture

NAME = "scienceqa"
PLAN = (
    # (room, kind, choices, test problems, has a picture, subject, topic, category)
    ("chains", "chain_eater", 4, 16, False, "natural science", "biology", "Ecological interactions"),
    ("chains", "chain_eaten", 3, 16, False, "natural science", "biology", "Ecological interactions"),
    ("chains", "chain_ends", 2, 8, False, "natural science", "biology", "Ecological interactions"),
    ("charts", "chart_max", 3, 12, False, "natural science", "science-and-engineering-practices", "Charts"),
    ("tables", "table_value", 4, 14, False, "social science", "economics", "Tables"),
    ("tables", "table_extreme", 3, 14, False, "social science", "economics", "Tables"),
    ("chains", "chain_eater", 4, 12, True, "natural science", "biology", "Ecological interactions"),
    ("maps", "map_neighbor", 4, 14, True, "social science", "geography", "Maps"),
    ("maps", "map_corner", 3, 6, True, "social science", "geography", "Maps"),
    ("charts", "chart_max", 4, 10, True, "natural science", "science-and-engineering-practices", "Charts"),
    ("charts", "chart_value", 5, 8, True, "natural science", "science-and-engineering-practices", "Charts"),
    ("diagrams", "diagram_color", 4, 8, True, "natural science", "science-and-engineering-practices", "Diagrams"),
    ("lamps", "lamp_count", 3, 6, True, "natural science", "physics", "Electric circuits"),
    ("polygons", "polygon_corners", 4, 6, True, "language science", "figurative-language", "Shapes"),
)
PICTURE_HINTS = {
    "map_neighbor": "North is at the top of the map.",
    "lamp_count": "A lamp is on if its switch is closed.",
}
OTHER_SPLITS = {"train": 6, "val": 4}
"""Problems that are not for the test, and that a score must not count."""


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write all files; returns what is in the test split."""
    deck = Deck(NAME, seed)
    drawn = [
        (deck.deal(room, kind, num_choices, by_facts=not has_picture), has_picture, words)
        for room, kind, num_choices, number, has_picture, *words in PLAN
        for _ in range(number)
    ]
    deck.rng("order").shuffle(drawn)
    splits = ["test"] * len(drawn)
    for split, number in OTHER_SPLITS.items():
        drawn += [(deck.deal("maps", "map_corner", 3), True, list(PLAN[8][5:])) for _ in range(number)]
        splits += [split] * number
    ids = [str(number) for number in sorted(deck.rng("ids").sample(range(1, 22_000), len(drawn)))]
    problems: dict[str, dict[str, Any]] = {}
    for pid, split, (item, has_picture, words) in zip(ids, splits, drawn, strict=True):
        problems[pid] = _problem(item, has_picture, words)
        if has_picture:
            write_picture(folder / "images" / split / pid / "image.png", item.png)
    members = {name: [pid for pid, split in zip(ids, splits, strict=True) if split == name] for name in set(splits)}
    write_json(folder / "problems.json", problems)
    write_json(
        folder / "pid_splits.json",
        {
            "train": members["train"],
            "val": members["val"],
            "trainval": members["train"] + members["val"],
            "test": members["test"],
        },
    )
    num_pictures = sum(problems[pid]["image"] is not None for pid in members["test"])
    return {"rows": len(members["test"]), "pictures": num_pictures, "text_only": len(members["test"]) - num_pictures}


def _problem(item: Item, has_picture: bool, words: list[Any]) -> dict[str, Any]:
    subject, topic, category = words
    return {
        "question": item.question,
        "choices": list(item.options),
        "answer": item.answer,
        "hint": PICTURE_HINTS.get(item.kind, "") if has_picture else item.facts,
        "image": "image.png" if has_picture else None,
        "grade": f"grade{2 + len(item.options)}",
        "subject": subject,
        "topic": topic,
        "category": category,
        "lecture": "",
        "solution": f"{item.facts}. The answer is {item.text}.",
    }
