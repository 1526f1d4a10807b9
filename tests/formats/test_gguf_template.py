"""Chat templates of GGUF files: llama.cpp's marker has behind it what a picture has in the model's own template."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_models import FAMILIES, write_family
from gguf import GGUFReader
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grace_vlm.formats.gguf_template import MARKER, for_llama_cpp
from grace_vlm.formats.pack import pack
from grace_vlm.models.llava_layout import LLAVA_CHAT_TEMPLATE
from grace_vlm.models.smollm2 import CHAT_TEMPLATE as SMOLLM2
from grace_vlm.models.toy import CHAT_TEMPLATE as QWEN

PICTURE, QUESTION = {"type": "image"}, {"type": "text", "text": "what is this?"}
MARKED = {"type": "text", "text": MARKER}


def rendered(template: str, *turns: object) -> str:
    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return world.from_string(template).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("template", [LLAVA_CHAT_TEMPLATE, SMOLLM2], ids=["llava", "smollm2"])
def test_a_marker_is_followed_by_what_follows_a_picture(template: str) -> None:
    own = for_llama_cpp(template)
    wanted = rendered(template, [PICTURE, QUESTION], [QUESTION], [PICTURE, PICTURE, QUESTION])
    wanted = wanted.replace("<image>", MARKER)
    assert f"{MARKER}\nwhat is this?" in wanted
    text = "what is this?"
    assert rendered(own, MARKER + text, text, MARKER * 2 + text) == wanted, "llama.cpp's joined text"
    assert rendered(own, [MARKED, QUESTION], [QUESTION], [MARKED, MARKED, QUESTION]) == wanted, "parts"
    plain = (text, text, [QUESTION])
    assert rendered(own, *plain) == rendered(template, *plain), "without a picture nothing changes"
    assert rendered(own, [PICTURE, QUESTION]) == rendered(template, [PICTURE, QUESTION])


@pytest.mark.parametrize(
    "template",
    [
        QWEN,  # its marks of a picture are llama.cpp's own affair
        "{{ messages[0].content[0].text }}\n",
        "{% for part in messages[0].content %}{{ part.text }}{% endfor %}",
        "{{ raise_exception('tools are needed') }}",
        "{% if messages %}",
        "{{ messages[0].content[0].text.nothing() }}",
        "{{ messages[7].content }}",
        "{{ messages|dictsort }}",
        "",
    ],
)
def test_others_stay_as_they_are(template: str) -> None:
    assert for_llama_cpp(template) == template


def test_a_turn_without_content_stays_as_it_is() -> None:
    parts = "{% for part in turn.content or [] %}{{ part.text or '<image>\n' }}{% endfor %}"
    template = f"{{% for turn in messages %}}{parts}.{{% endfor %}}"
    assert rendered(for_llama_cpp(template), [PICTURE, QUESTION], None) == "<image>\nwhat is this?.."


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_has_it(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", family, "w4g128")
    file = GGUFReader(pack(folder, tmp_path / "packed", "gguf") / "model.gguf")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = file.fields["tokenizer.chat_template"].contents()
    assert found == for_llama_cpp(template)
    assert (found == template) == (family != "LLaVA-1.5")
