"""The chat template of a GGUF file, so that llama.cpp asks about pictures as the model learned it.

llama.cpp shows a template no picture: it joins the parts of a turn to one text, with a marker of its own where a
picture is and nothing beside it. What the model's template has behind a picture is lost so, and for LLaVA that is the
line break before the question: SmolLM2's student, trained with it, then answered a third of its questions otherwise
(docs/log.md, 2026-11-30). Before such a template stand lines that put it behind the marker; others stay as they are.
"""

from __future__ import annotations

import json

MARKER = "<__media__>"
"""llama.cpp's (``mtmd_default_marker``); where a server is told another one, its turns go as they are."""

_WORD = "what-stands-behind-a-picture"
"""In no template."""

_LINES = """\
{%- set taken = namespace(turns=[], parts=[]) -%}
{%- for turn in messages -%}
{%- if turn.content is string -%}
{%- set taken.turns = taken.turns + [dict(turn, content=turn.content.replace(MARKER, BOTH))] -%}
{%- elif turn.content is iterable -%}
{%- set taken.parts = [] -%}
{%- for part in turn.content -%}
{%- if part.type == 'text' -%}
{%- set taken.parts = taken.parts + [dict(part, text=part.text.replace(MARKER, BOTH))] -%}
{%- else -%}
{%- set taken.parts = taken.parts + [part] -%}
{%- endif -%}
{%- endfor -%}
{%- set taken.turns = taken.turns + [dict(turn, content=taken.parts)] -%}
{%- else -%}
{%- set taken.turns = taken.turns + [turn] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = taken.turns -%}
"""


def for_llama_cpp(template: str) -> str:
    """``template``, after lines that do for llama.cpp's marker what it does for a picture; itself if that is nothing,
    or if it cannot be told."""
    behind = _behind_picture(template)
    if not behind:
        return template
    lines = _LINES.replace("MARKER", json.dumps(MARKER)).replace("BOTH", json.dumps(MARKER + behind))
    return lines + template


def _behind_picture(template: str) -> str:
    """The blanks and line breaks between a picture and the text after it."""
    from jinja2 import TemplateError  # here: most who import formats write no GGUF

    text = {"type": "text", "text": _WORD}
    try:
        shown, plain = (_before_word(template, parts) for parts in ([{"type": "image"}, text], [text]))
    except (TemplateError, AttributeError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError):
        return ""  # it wants what we do not know of, tools perhaps
    return "" if shown == plain else shown[len(shown.rstrip()) :]


def _before_word(template: str, parts: list[dict[str, str]]) -> str:
    """What a template, rendered as Transformers does, has before the text of a turn."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    turn = {"role": "user", "content": parts}
    return world.from_string(template).render(messages=[turn], add_generation_prompt=True).split(_WORD)[0]
