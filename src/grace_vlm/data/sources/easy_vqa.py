"""easy-VQA (Victor Zhou, MIT): 5,000 pictures of 64 x 64 with one coloured shape, 48,248 questions, 13 answers.

The pictures and questions come from the ``easy-vqa`` package, unchanged. Its 1,000 test pictures stay the test split;
of its 4,000 training pictures, 400 drawn by the seed become the validation split, with all their questions.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from grace_vlm.data.sources.grids import Cell
from grace_vlm.data.sources.questions import AskedPicture, Question, Sizes
from grace_vlm.errors import ConfigError
from grace_vlm.media.canvas import COLORS, SHAPES
from grace_vlm.media.image import load_image

DEFAULT_SIZES = Sizes(num_train_images=3600, num_val_images=400, num_test_images=1000)
LICENCE = "easy-VQA by Victor Zhou (MIT), https://github.com/vzhou842/easy-VQA"
MIN_TILE_PX = 120
"""A mosaic takes pictures whose shape covers at least this many pixels; below it a triangle is a few dots."""


def pictures(seed: int, sizes: Sizes) -> Iterator[AskedPicture]:
    """All pictures of all splits with all their questions, in the package's order."""
    for split, members in _members(seed, sizes).items():
        package = _read_package("test" if split == "test" else "train")
        for number in members:
            path, pairs = package[number]
            questions = tuple(_question(text, answer) for text, answer in pairs)
            name, caption = (
                f"easy-{split}-{number:05d}.png",
                " ".join(word for words in _facts(pairs) for word in words),
            )
            yield AskedPicture(split, name, path.read_bytes(), questions, caption)


def read_tiles(seed: int) -> dict[str, list[Cell]]:
    """For each split, the pictures of which the questions tell both colour and shape, and which show it well."""
    tiles: dict[str, list[Cell]] = {}
    for split, members in _members(seed, DEFAULT_SIZES).items():
        package = _read_package("test" if split == "test" else "train")
        cells = (_tile(*package[number]) for number in members)
        tiles[split] = [cell for cell in cells if cell is not None]
    return tiles


def _members(seed: int, sizes: Sizes) -> dict[str, list[int]]:
    """The numbers of the pictures in each split; a smaller size takes a part of the same split."""
    train = sorted(_read_package("train"))
    val = set(random.Random(f"{seed}/easy-vqa/val").sample(train, DEFAULT_SIZES.num_val_images))
    whole = {
        "train": [number for number in train if number not in val],
        "val": sorted(val),
        "test": sorted(_read_package("test")),
    }
    for split, num_images in sizes.items():
        if num_images > len(whole[split]):
            raise ConfigError(
                f"num_{split}_images={num_images}: easy-vqa has {len(whole[split])} pictures there; ask for fewer"
            )
    return {split: whole[split][:num_images] for split, num_images in sizes.items()}


@cache
def _read_package(part: str) -> dict[int, tuple[Path, tuple[tuple[str, str], ...]]]:
    """Number of the picture -> (its file, its questions with answers), of the package's ``train`` or ``test``."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ConfigError(
            "the source easy-vqa needs its package, which is not installed; pip install easy-vqa"
        ) from error
    get_questions, get_paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[part]
    pairs: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, number in zip(*get_questions(), strict=True):
        pairs[number].append((text, answer))
    return {number: (Path(path), tuple(pairs[number])) for number, path in sorted(get_paths().items())}


def _question(text: str, answer: str) -> Question:
    if answer in ("yes", "no"):
        return Question("easy_yes_no", "yes_no", text, answer)
    return Question("easy_color" if answer in COLORS else "easy_shape", "open", text, answer)


@cache
def _tile(path: Path, pairs: tuple[tuple[str, str], ...]) -> Cell | None:
    """What the questions say about the picture, as a cell of a mosaic; None where they leave a part open."""
    colors, shapes = _facts(pairs)
    if len(colors) != 1 or len(shapes) != 1:
        return None
    cell = Cell(colors[0], shapes[0], tile=path)
    shown = load_image(path).image.getcolors() or []
    area_px = sum(num_pixels for num_pixels, rgb in shown if rgb == COLORS[cell.color])
    return cell if area_px >= MIN_TILE_PX else None


def _facts(pairs: tuple[tuple[str, str], ...]) -> tuple[list[str], list[str]]:
    """(colours, shapes) that the answered questions prove true of their picture; one of each at most."""
    facts = {word for text, answer in pairs for word in _told(text, answer)}
    return sorted(facts & set(COLORS)), sorted(facts & set(SHAPES))


def _told(text: str, answer: str) -> list[str]:
    """The words (a colour, a shape) that one answered question proves true of its picture."""
    words = re.findall(r"\w+", text)
    if answer not in ("yes", "no"):
        return [*words, answer]
    return words if (answer == "yes") != is_negated(text) else []


def is_negated(text: str) -> bool:
    """Whether a question asks for what is not there: ``is there not a red shape?``"""
    return not {"no", "not"}.isdisjoint(re.findall(r"\w+", text))
