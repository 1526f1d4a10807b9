"""A model that learned answers stops after them, whatever its family's template closes them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import write_rows

from grace_vlm.data.collate import collate
from grace_vlm.data.encode import Encoder
from grace_vlm.data.rows import Row, Turn
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ASKED = {"what color?": "blue green", "how many?": "red", "what is it?": "cat"}


@pytest.mark.parametrize("template", ["own", "llava-hf"])
def test_an_overfitted_llava_answers_and_ends(template: str, tmp_path: Path) -> None:
    write_rows(tmp_path, 2)
    processor: Any = build_toy_processor([*ASKED, *ASKED.values()] * 4, size="llava")
    if template == "llava-hf":
        processor.chat_template = LLAVA_HF_TEMPLATE
    model = build_toy_model("llava", processor)
    adapter = adapter_for("llava")
    encoder = Encoder(processor, adapter, model.config)
    rows = [Row(i, str(i), (), (Turn("user", q), Turn("assistant", a))) for i, (q, a) in enumerate(ASKED.items())]
    batch = collate([encoder.encode(row, []) for row in rows], [], [], processor.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        states = adapter.decode(model, batch.input_ids, batch.position_ids, [])
        hidden = states.last.flatten(0, 1)[batch.supervised]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.02
    llm = LLM(LoadedModel(model.eval(), processor, adapter, "toy"))
    answers = llm.generate(list(ASKED), sampling=SamplingParams(max_tokens=12))
    assert [answer.text.strip() for answer in answers] == list(ASKED.values())
    assert {answer.finish for answer in answers} == {"stop"}
