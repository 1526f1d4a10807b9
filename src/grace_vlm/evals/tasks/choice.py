"""What the multiple-choice tasks share: the parser that a profile names, right or wrong by the letter, and budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from grace_vlm.errors import DataError
from grace_vlm.evals.tasks.columns import EXPECTED, Cells
from grace_vlm.evals.tasks.letters import LetterRule, card_letter, kit_letter
from grace_vlm.evals.tasks.strict import strict_letter
from grace_vlm.evals.tasks.task import About, Doc, Extract, Picture, Profile, checked_profile

KIT_NEW_TOKENS = 16_384
"""Of VLMEvalKit's registered Qwen3-VL-2B-Instruct."""
STRICT_NEW_TOKENS = 32
"""Room for a sentence. Greedy, the card's 8 tokens are the first 8 of these."""


def rules(lmms: LetterRule, card: LetterRule = card_letter) -> Mapping[Profile, LetterRule]:
    """A task's parser by profile."""
    return {"card": card, "lmms": lmms, "kit": kit_letter, "strict": strict_letter}


def yes_no_rules(by_profile: Mapping[Profile, Callable[[str], Extract]]) -> Mapping[Profile, LetterRule]:
    """Parsers of yes and no, which need no options, in the form of those that do."""
    return {profile: lambda raw, options, rule=rule: rule(raw) for profile, rule in by_profile.items()}  # type: ignore[misc]


class ReadByRule:
    """What tasks share whose replies are read by a rule a profile, and are right where they say the gold one. A row's
    groups are its columns, unless the task says more."""

    about: About
    rules: ClassVar[Mapping[Profile, LetterRule]]

    def extract(self, raw: str, doc: Doc, profile: Profile) -> Extract:
        return self.rules[checked_profile(self.about, profile)](raw, doc.options)

    def score(self, doc: Doc, extract: Extract, profile: Profile) -> float:
        return same_letter(doc, extract)

    def groups(self, doc: Doc) -> Mapping[str, str]:
        return doc.columns


def budget(profile: Profile, lmms: int, card: int = 8) -> int:
    """The most tokens that a profile lets a model write."""
    return {"card": card, "lmms": lmms, "kit": KIT_NEW_TOKENS, "strict": STRICT_NEW_TOKENS}[profile]


def same_letter(doc: Doc, extract: Extract) -> float:
    """1 where the extracted value is the gold one; unparsed is wrong."""
    return float(extract.status == "ok" and extract.value == doc.gold)


def gold_letter(cells: Cells, column: str, options: Mapping[str, str]) -> str:
    """The gold answer as a letter of ``options``, from a letter.

    Raises:
        DataError: it is none.
    """
    letter = cells.text(column).strip().upper()
    if letter not in options:
        raise cells.fault(column, f"one of the letters {', '.join(options)}")
    return letter


def gold_index(cells: Cells, column: str, options: Mapping[str, str]) -> str:
    """The same from a place in the list of options, counted from 0.

    Raises:
        DataError: there is no such option.
    """
    index = cells.integer(column)
    if not 0 <= index < len(options):
        raise cells.fault(column, f"a place in the options, 0 to {len(options) - 1}")
    return list(options)[index]


def the_picture(cells: Cells, pictures: Mapping[str, Picture]) -> Picture:
    """The row's one picture, in the column ``image``.

    Raises:
        DataError: it has none.
    """
    if "image" not in pictures:
        raise cells.fault("image", EXPECTED["picture"])
    return pictures["image"]


def check_options(cells: Cells, options: Mapping[str, str], most: int = 10) -> None:
    """
    Raises:
        DataError: fewer than two options, or more than there are letters.
    """
    if not 2 <= len(options) <= most:
        raise DataError(f"{cells.place} has {len(options)} options; expected 2 to {most}: correct the file")
