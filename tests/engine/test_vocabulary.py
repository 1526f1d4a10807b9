"""Head and embeddings in 8 bits: one copy, the numbers of their grid, and no word that is none."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from worlds import DEVICE, asked, loaded_toy, on_a_cpu, pictures

from grace_vlm.engine import vocabulary
from grace_vlm.engine.engine import Engine, EngineOptions
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.engine.vocabulary import quantized_rows, take_vocabulary
from grace_vlm.errors import ConfigError
from grace_vlm.kernels.cpu import why_not
from grace_vlm.kernels.fragments import PackedLinear, row_scales, unpack_codes
from grace_vlm.kernels.low_bit_cpu import PanelLinear
from grace_vlm.models.load import LoadedModel
from grace_vlm.quant.affine import dequantize

INT8 = EngineOptions(int8_head=True, cpu_activations="fp32")


def with_words(size: str, num_more: int, is_tied: bool) -> LoadedModel:
    """A toy with so many words more, embeddings and head one tensor or two."""
    loaded = loaded_toy(size)
    embed, head = loaded.model.model.language_model.embed_tokens, loaded.adapter.head(loaded.model)
    generator = torch.Generator().manual_seed(3)
    more = torch.randn(num_more, head.weight.shape[1], generator=generator) / head.weight.shape[1] ** 0.5
    for module in (head, embed):
        rows = torch.cat([module.weight.detach(), more.to(module.weight)])
        module.weight = nn.Parameter(rows, requires_grad=False)
    if is_tied:
        embed.weight = head.weight
    return loaded


def on_their_grid(loaded: LoadedModel) -> LoadedModel:
    """The same model with the numbers that 8 bits hold: the head's, and the embeddings' where they are tied."""
    found = copy.deepcopy(loaded)
    embed, head = found.model.model.language_model.embed_tokens, found.adapter.head(found.model)
    is_tied = embed.weight is head.weight
    tensor = quantized_rows(head.weight)
    head.weight = nn.Parameter(dequantize(tensor.codes, tensor.scale, head.weight.dtype), requires_grad=False)
    if is_tied:
        embed.weight = head.weight
    return found


@on_a_cpu
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("family", "num_more"), [("tiny", 0), ("qwen2_vl", 5), ("llava", 7)])
def test_answers_are_those_of_a_model_on_their_grid(family: str, num_more: int, is_tied: bool, tmp_path: Path) -> None:
    loaded, prompts = with_words(family, num_more, is_tied), asked(pictures(tmp_path, 3), 12)
    texts, images = [text for text, _ in prompts], [images for _, images in prompts]
    params = SamplingParams(max_tokens=10, logprobs=5, ignore_eos=True)
    right = LLM(on_their_grid(loaded)).generate(texts, images, params)
    plain = LLM(copy.deepcopy(loaded)).generate(texts, images, params)
    for options in (INT8, replace(INT8, cache_tokens=1536, max_running=5, max_step_tokens=32)):
        found = LLM(copy.deepcopy(loaded), options=options).generate(texts, images, params)
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in right]
        for ours, theirs in zip(found, right, strict=True):
            for a, b in zip(ours.choices, theirs.choices, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    away = [abs(a.choices[0].logprob - b.choices[0].logprob) for a, b in zip(found, plain, strict=True)]
    assert 1e-5 < max(away) < 0.1  # what is on the grid is not what was


@pytest.mark.parametrize("is_tied", [True, False])
def test_there_is_one_copy(is_tied: bool) -> None:
    loaded = with_words("tiny", 5, is_tied)
    width = loaded.adapter.head(loaded.model).in_features
    plain, small = Engine(copy.deepcopy(loaded)), Engine(loaded, options=INT8)
    weights = small.weights
    in_panels = DEVICE.type == "cpu" and why_not() is None
    assert isinstance(weights.head.linear.weight, PanelLinear if in_panels else PackedLinear)
    group = next(size for size in (128, 64, 32) if width % size == 0)
    expected = 400 * (width + 4 * width // group) if in_panels else 400 * (width + 2)
    assert (weights.embeddings.weight is weights.head.linear.weight) == is_tied
    assert weights.head.linear.weight.num_bytes == expected
    assert weights.embeddings.num_words == weights.head.num_words == 389
    dense = 389 * width * weights.dtype.itemsize
    assert plain.weights.num_bytes - weights.num_bytes == dense - expected
    left = [p for p in loaded.model.parameters() if p.shape == (389, width)]
    assert len(left) == (0 if is_tied else 1)


def test_no_word_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all logits are below 0, those of the rows that fill up the last tile would be the largest."""
    monkeypatch.setattr(vocabulary, "missing", lambda: "tiles are what is filled up")
    embed, head = nn.Embedding(21, 64), nn.Linear(64, 21)
    x = torch.rand(70, 64) + 0.1
    with torch.no_grad():
        head.weight.copy_(-torch.rand(21, 64) - 0.1)
        head.bias.copy_(-torch.arange(21.0))
    weight, bias = head.weight.detach(), head.bias.detach()
    embeddings, int8 = take_vocabulary(embed.to(DEVICE), head.to(DEVICE), rows=None, int8=True)
    logits = int8(x.to(DEVICE)).cpu()
    assert logits.shape == (70, 21)
    assert logits.max() < 0
    packed = int8.linear.weight
    assert isinstance(packed, PackedLinear)
    q, s = unpack_codes(packed).cpu(), row_scales(packed).float().cpu()
    assert not q[21:].any()
    assert ((q[:21] * s[:21] - weight).abs() <= s[:21] * 0.8).all()  # a scale that is rounded down cuts the largest
    torch.testing.assert_close(logits, x @ (q[:21] * s[:21]).T + bias, atol=1e-3, rtol=1e-3)
    assert head.weight is None
    assert torch.equal(embeddings(torch.tensor([3, 20], device=DEVICE)), embed.weight[[3, 20]])


def test_batch_invariant_requests_are_those_alone_to_the_last_bit() -> None:
    options = EngineOptions(max_running=5, batch_invariant=True, int8_head=True, kv_cache="fp8")
    crowd, alone = (LLM(with_words("tiny", 5, True), options=options) for _ in range(2))
    texts = ["yes", "count the blue triangles", "is there", "no", "how many are there"] * 3
    params = [SamplingParams(max_tokens=8, temperature=n % 2, seed=n, logprobs=1) for n in range(15)]
    together = crowd.generate(texts, sampling=params)
    assert together == [alone.generate([text], sampling=[one])[0] for text, one in zip(texts, params, strict=True)]


def test_a_width_that_no_kernel_takes_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        take_vocabulary(nn.Embedding(32, 40), nn.Linear(40, 32), rows=None, int8=True)
    assert str(caught.value) == (
        "int8_head was asked for and the model is 40 wide; expected a multiple of 32: leave it out"
    )
