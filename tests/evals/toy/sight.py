"""Answers by looking at the pixels: an oracle that knows nothing of how a picture was made."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grace_vlm.media.canvas import COLORS

Thing = tuple[int, int, str, str]
"""Row and column from 1, colour, shape."""
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
WINDS = {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}
CORNERS = {"northwest": (0, 0), "northeast": (0, 1), "southwest": (2, 0), "southeast": (2, 1)}


def answer(question: str, png: bytes) -> str | None:
    """The answer, if it takes no reading but of a diagram's labels: None for digits and other names."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    for pattern, look in _LOOKS.items():
        if found := re.fullmatch(pattern, question):
            return look(pixels, *found.groups())
    return None


def mask(pixels: np.ndarray, color: str) -> np.ndarray:
    return (pixels == COLORS[color]).all(-1)


def yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


# --- grids ---


def things(pixels: np.ndarray) -> list[Thing]:
    """The shapes of a 4 x 4 grid by colour, fill and symmetry."""
    found = []
    for row in range(4):
        for column in range(4):
            cell = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            color, area = max(((color, int(mask(cell, color).sum())) for color in COLORS), key=lambda pair: pair[1])
            if area > 60:
                found.append((row + 1, column + 1, color, shape_of(mask(cell, color))))
    return found


def shape_of(drawn: np.ndarray) -> str:
    rows, columns = np.nonzero(drawn)
    box = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    fill, height = box.mean(), len(box)
    if fill > 0.95:
        return "rectangle"
    if fill > 0.68:
        return "circle"
    widths = box.sum(1)
    if abs(int(widths[: height // 3].sum()) - int(widths[-(height // 3) :].sum())) <= 0.1 * widths.sum():
        # Upright symmetric: a cross is widest in its middle third only; a star has its arms above the middle.
        middle = widths[height // 2 - 1 : height // 2 + 2]
        if middle.min() >= 0.95 * box.shape[1]:
            return "cross"
        return "star"
    return "triangle" if widths[-2] > 0.85 * box.shape[1] else "star"


def called(pixels: np.ndarray, phrase: str) -> list[Thing]:
    """Those that a phrase like ``red shapes``, ``crosses`` or ``red circle`` names."""
    singular = {"crosses": "cross", **{f"{shape}s": shape for shape in ("circle", "rectangle", "star", "triangle")}}
    words = [singular.get(word, word) for word in phrase.split() if word != "shapes"]
    return [thing for thing in things(pixels) if all(word in thing[2:] for word in words)]


def the(pixels: np.ndarray, phrase: str) -> Thing:
    (thing,) = called(pixels, phrase)
    return thing


def at(pixels: np.ndarray, row: int, column: int) -> Thing:
    (thing,) = [thing for thing in things(pixels) if thing[:2] == (row, column)]
    return thing


def relation(pixels: np.ndarray, first: str, word: str, second: str) -> str:
    a, b, (down, right) = the(pixels, first), the(pixels, second), STEPS[word]
    return yes((a[0] - b[0]) * down + (a[1] - b[1]) * right > 0)


def direction(pixels: np.ndarray, first: str, second: str) -> str:
    a, b = the(pixels, first), the(pixels, second)
    assert (a[0] == b[0]) != (a[1] == b[1]), "one direction and no other"
    return ("left of" if a[1] < b[1] else "right of") if a[0] == b[0] else ("above" if a[0] < b[0] else "below")


def neighbor(pixels: np.ndarray, what: str, word: str, anchor: str) -> str:
    place, (down, right) = the(pixels, anchor), STEPS[word]
    return at(pixels, place[0] + down, place[1] + right)[2 if what == "color" else 3]


# --- charts ---


def bars(pixels: np.ndarray) -> dict[str, int]:
    """Colour -> value of every bar: 11 pixels a unit above the line at 120."""
    found = {}
    for color in COLORS:
        rows, columns = np.nonzero(mask(pixels, color))
        if len(rows) and rows.max() == 120 and np.ptp(columns) >= 8:
            found[color] = int(120 - rows.min()) // 11
    return found


def ranked(pixels: np.ndarray, word: str) -> str:
    colors = sorted(bars(pixels), key=bars(pixels).__getitem__)
    return colors[{"tallest": -1, "second tallest": -2, "shortest": 0}[word]]


# --- maps and lines ---


def regions(pixels: np.ndarray) -> list[list[str]]:
    """Three rows of two colours, found along a column of each side."""
    columns = []
    for x in (20, 90):
        seen = [next((c for c in COLORS if (pixels[y, x] == COLORS[c]).all()), None) for y in range(128)]
        columns.append([color for color in dict.fromkeys(seen) if color])
    assert [len(column) for column in columns] == [3, 3]
    return [[columns[0][row], columns[1][row]] for row in range(3)]


def next_region(pixels: np.ndarray, wind: str, color: str) -> str:
    table, (down, right) = regions(pixels), WINDS[wind]
    (place,) = [(row, column) for row in range(3) for column in range(2) if table[row][column] == color]
    return table[place[0] + down][place[1] + right]


def line_length(pixels: np.ndarray, color: str) -> tuple[int, int]:
    """(pixels across, height) of the row that a line covers most, with neither fins nor gaps."""
    drawn = mask(pixels, color)
    row = int(drawn.sum(1).argmax())
    run = np.nonzero(drawn[row])[0]
    return int(np.ptp(run)) + 1, row


# --- what has one kind of question ---

STRIPES = {
    "Armenia": "red blue orange", "Belgium": "black yellow red", "Bulgaria": "white green red",
    "Estonia": "blue black white", "France": "blue white red", "Germany": "black red yellow",
    "Hungary": "red white green", "Ireland": "green white orange", "Italy": "green white red",
    "Lithuania": "yellow green red", "Nigeria": "green white green", "Peru": "red white red",
    "Romania": "blue yellow red", "Russia": "white blue red",
}  # fmt: skip
VERTICAL = ("Belgium", "France", "Ireland", "Italy", "Nigeria", "Peru", "Romania")
INKS = {"black": (0, 0, 0), "white": (255, 255, 255), "red": (200, 20, 40), "blue": (0, 50, 160), "green": (0, 135, 75),
        "yellow": (252, 209, 22), "orange": (255, 130, 0)}  # fmt: skip


def flag(pixels: np.ndarray) -> str:
    """The country by the stripes' direction and rough colours."""
    cloth = (pixels != pixels[0, 0]).any(-1)
    rows, columns = np.nonzero(cloth)
    part = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(int)
    height, width = part.shape[:2]
    is_vertical = (part[2, width // 2] != part[2, 2]).any()
    middles = [(2 * n + 1) / 6 for n in range(3)]
    spots = [part[height // 2, int(m * width)] if is_vertical else part[int(m * height), width // 2] for m in middles]
    names = [min(INKS, key=lambda name: np.abs(np.array(INKS[name]) - spot).sum()) for spot in spots]
    (country,) = [c for c, told in STRIPES.items() if told.split() == names and (c in VERTICAL) == is_vertical]
    return country


def mood(pixels: np.ndarray) -> str:
    """By the dark pixels of the face's lower half: a blob, a flat line, or one that bends down or up."""
    face = max(COLORS, key=lambda color: mask(pixels, color).sum())
    rows = np.nonzero(mask(pixels, face))[0]
    middle = (rows.min() + rows.max()) // 2
    ys, xs = np.nonzero((pixels[middle:] == (40, 40, 40)).all(-1))
    if np.ptp(xs) < 1.5 * np.ptp(ys):
        return "surprised"
    if np.ptp(ys) <= 4:
        return "calm"
    center = (xs.min() + xs.max()) / 2
    return "happy" if ys[np.abs(xs - center) < 3].mean() > ys[xs < xs.min() + 3].mean() else "sad"


def num_lamps(pixels: np.ndarray, word: str) -> str:
    """A closed switch is a straight vertical line between its contacts, at their height."""
    lamps = [np.nonzero(mask(pixels, color)[84]) for color in COLORS]
    middles = [int(columns[0].mean()) for columns in lamps if len(columns[0])]
    is_dark = (pixels < 100).all(-1)
    on = sum(bool(is_dark[40:46, x - 1 : x + 2].any(1).all()) for x in middles)
    return str(on if word == "on" else len(middles) - on)


def pattern(pixels: np.ndarray) -> str:
    """By whether rows, columns or neither are of one colour; checks have no row that is all background."""
    color = next(color for color in COLORS if mask(pixels, color).sum() > 100)
    drawn = mask(pixels, color)
    if (drawn == drawn[:, :1]).all():
        return "horizontal stripes"
    if (drawn == drawn[:1]).all():
        return "vertical stripes"
    return "dots" if (~drawn).all(1).any() else "checks"


def next_in_sequence(pixels: np.ndarray, what: int) -> str:
    """The eighth of what repeats after the shortest period that fits seven."""
    cells = [pixels[32 * (1 + n // 4) : 32 * (2 + n // 4), 32 * (n % 4) : 32 * (n % 4) + 32] for n in range(7)]
    colors = [max(COLORS, key=lambda color: mask(cell, color).sum()) for cell in cells]
    seen = [(color, shape_of(mask(cell, color))) for color, cell in zip(colors, cells, strict=True)]
    period = next(p for p in range(1, 7) if all(seen[n] == seen[n % p] for n in range(7)))
    return seen[7 % period][what]


def num_corners(pixels: np.ndarray) -> str:
    """Dots that are thicker than the lines, counted as connected blobs of what five-pixel squares fit into."""
    drawn = mask(pixels, max(COLORS, key=lambda color: mask(pixels, color).sum()))
    thick = [(y, x) for y, x in zip(*np.nonzero(drawn), strict=True) if drawn[y - 2 : y + 3, x - 2 : x + 3].all()]
    left = set(thick)
    blobs = 0
    while left:
        blobs += 1
        todo = [left.pop()]
        while todo:
            y, x = todo.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
    return str(blobs)


# --- labelled diagrams ---

PLACES = {"top left": (44, 44), "top right": (148, 44), "bottom left": (44, 140), "bottom right": (148, 140)}
LABELS = [
    "A",
    "B",
    "C",
    "D",
    "bark",
    "bud",
    "bulb",
    "cone",
    "fruit",
    "leaf",
    "petal",
    "root",
    "seed",
    "stem",
    "thorn",
    "twig",
]


def disc_at(pixels: np.ndarray, place: str) -> str:
    """Colour of the disc in a corner."""
    x, y = PLACES[place]
    return next(color for color in COLORS if (pixels[y, x] == COLORS[color]).all())


def place_of(pixels: np.ndarray, color: str) -> str:
    return next(place for place in PLACES if disc_at(pixels, place) == color)


@cache
def printed(label: str, place: str) -> np.ndarray:
    """A label's box as it looks beside a disc."""
    image = Image.new("RGB", (192, 192), (255, 255, 255))
    x, y = PLACES[place]
    y += -27 if place.startswith("top") else 27
    ImageDraw.Draw(image).text((x, y), label, font=ImageFont.load_default(14), fill=(60, 60, 60), anchor="mm")
    return np.asarray(image)[y - 8 : y + 9, x - 22 : x + 23]


def label_at(pixels: np.ndarray, place: str) -> str:
    """The one label that looks like this."""
    x, y = PLACES[place]
    y += -27 if place.startswith("top") else 27
    box = pixels[y - 8 : y + 9, x - 22 : x + 23]
    (label,) = [label for label in LABELS if np.array_equal(printed(label, place), box)]
    return label


def arrows(pixels: np.ndarray) -> list[tuple[str, str]]:
    """(from, to): where a line is five or more pixels wide just before it reaches a disc, there is a head."""
    is_ink, found = (pixels == (60, 60, 60)).all(-1), []
    for start in PLACES:
        for end in PLACES:
            if start != end:
                step = np.subtract(PLACES[end], PLACES[start]) / np.hypot(*np.subtract(PLACES[end], PLACES[start]))
                spots = [np.array(PLACES[end]) - 23.5 * step + k * step[::-1] * (1, -1) for k in range(-4, 5)]
                if sum(bool(is_ink[round(y), round(x)]) for x, y in spots) >= 5:
                    found.append((start, end))
    return found


def target(pixels: np.ndarray, color: str) -> str:
    """Where the arrow of a disc leads."""
    (end,) = [end for start, end in arrows(pixels) if start == place_of(pixels, color)]
    return end


_LOOKS: dict[str, Callable[..., str]] = {
    r"how many bars are there\?": lambda p: str(len(bars(p))),
    r"what color is the (tallest|second tallest|shortest) bar\?": ranked,
    r"what is the value of the (\w+) bar\?": lambda p, color: str(bars(p)[color]),
    r"is the (\w+) bar taller than the (\w+) bar\?": lambda p, a, b: yes(bars(p)[a] > bars(p)[b]),
    r"how much taller is the (\w+) bar than the (\w+) bar\?": lambda p, a, b: str(bars(p)[a] - bars(p)[b]),
    r"what color is the region directly (\w+) of the (\w+) region\?": next_region,
    r"what color is the region in the (\w+)\?": lambda p, name: regions(p)[CORNERS[name][0]][CORNERS[name][1]],
    r"is the (\w+) line longer than the (\w+) line\?": lambda p, a, b: yes(
        line_length(p, a)[0] > line_length(p, b)[0] + 6
    ),
    r"are the (\w+) line and the (\w+) line equally long\?": lambda p, a, b: yes(
        abs(line_length(p, a)[0] - line_length(p, b)[0]) <= 6
    ),
    r"is the (\w+) line above the (\w+) line\?": lambda p, a, b: yes(line_length(p, a)[1] < line_length(p, b)[1]),
    r"how many (\w+ shapes|circles|crosses|rectangles|stars|triangles) are there\?": lambda p, phrase: str(
        len(called(p, phrase))
    ),
    r"how many (\w+ (?:circles|crosses|rectangles|stars|triangles)) are there\?": lambda p, phrase: str(
        len(called(p, phrase))
    ),
    r"is there a (\w+ [a-z]+)\?": lambda p, phrase: yes(bool(called(p, phrase))),
    r"are there more ([a-z ]+) than ([a-z ]+)\?": lambda p, a, b: yes(len(called(p, a)) > len(called(p, b))),
    r"what color is the shape in row (\d), column (\d)\?": lambda p, r, c: at(p, int(r), int(c))[2],
    r"what shape is in row (\d), column (\d)\?": lambda p, r, c: at(p, int(r), int(c))[3],
    r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?": relation,
    r"where is the (\w+ \w+), seen from the (\w+ \w+)\?": direction,
    r"where is the (\w+ \w+)\?": lambda p, name: "row {}, column {}".format(*the(p, name)[:2]),
    r"what (color|shape) is (?:the shape )?directly (left of|right of|above|below) the (\w+ \w+)\?": neighbor,
    r"which country has this flag\?": flag,
    r"how does the face feel\?": mood,
    r"how many lamps are (on|off)\?": num_lamps,
    r"what pattern is in the picture\?": pattern,
    r"what color is the pattern\?": lambda p: next(color for color in COLORS if mask(p, color).sum() > 100),
    r"which shape comes next\?": lambda p: next_in_sequence(p, 1),
    r"what color is the shape that comes next\?": lambda p: next_in_sequence(p, 0),
    r"how many (?:corners|sides) are there\?": num_corners,
    r"what color is the disc at the (top left|top right|bottom left|bottom right)\?": disc_at,
    r"which label is at the (top left|top right|bottom left|bottom right)\?": label_at,
    r"what is the label of the (\w+) disc\?": lambda p, color: label_at(p, place_of(p, color)),
    r"what is the label of the disc that the (\w+) disc points to\?": lambda p, color: label_at(p, target(p, color)),
    r"what color is the disc that the (\w+) disc points to\?": lambda p, color: disc_at(p, target(p, color)),
    r"how many arrows are there\?": lambda p: str(len(arrows(p))),
    r"how many arrows point to the (\w+) disc\?": lambda p, color: str(
        sum(end == place_of(p, color) for _, end in arrows(p))
    ),
}
