"""How a multiple-choice question is written. One function a program; the picture comes first in all of them.

``lmms`` differs from task to task and stands with the tasks; what they share is here.
"""

from __future__ import annotations

from collections.abc import Mapping

from grace_vlm.evals.tasks.task import Doc, Part, Profile

LMMS_ENDING = "Answer with the option's letter from the given choices directly."
LMMS_SHORT_ENDING = "Answer the question using a single word or phrase."
LETTERS = "ABCDEFGHIJ"


def lettered(texts: tuple[str, ...]) -> dict[str, str]:
    """Options under A, B, C, ..."""
    return dict(zip(LETTERS, texts, strict=False))


def dotted(options: Mapping[str, str]) -> str:
    """``A. text`` a line, as lmms-eval and VLMEvalKit write options."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def card_choice(question: str, options: Mapping[str, str], hint: str | None = None) -> str:
    """GRACE's scripts: context, question, ``(A) text`` a line, and the demand for a letter only."""
    lines = [f"Context: {hint.strip()}"] if hint is not None and hint.strip() else []
    lines.append(f"Question: {question.strip()}")
    lines.append("Options:\n" + "\n".join(f"({letter}) {text}" for letter, text in options.items()))
    lines.append("Answer with only the option letter.")
    return "\n".join(lines)


def kit_choice(question: str, options: Mapping[str, str], hint: str | None = None) -> str:
    """VLMEvalKit's ``ImageMCQDataset.build_prompt``, with its space before the last line's end. Qwen's own variant
    there is switched off for the registered Qwen3-VL-2B-Instruct."""
    text = "" if hint is None else f"Hint: {hint}\n"
    text += f"Question: {question}\n"
    if options:
        text += f"Options:\n{dotted(options)}\nPlease select the correct answer from the options above. \n"
    return text


def usual_choice(doc: Doc, profile: Profile) -> tuple[Part, ...]:
    """The prompt of a profile where the benchmark has none of its own."""
    if profile == "kit":
        return pictures_first(doc, kit_choice(doc.question, doc.options))
    if profile == "lmms":
        return pictures_first(doc, f"{doc.question}\n{dotted(doc.options)}\n{LMMS_ENDING}")
    return pictures_first(doc, card_choice(doc.question, doc.options))


def pictures_first(doc: Doc, text: str) -> tuple[Part, ...]:
    return (*doc.images, text)
