"""Weights of 4 and 8 bits on a CPU: run from their codes, exactly or with activations in bytes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from worlds import DEVICE, loaded_toy

from grace_vlm.engine import layers
from grace_vlm.engine.engine import EngineOptions
from grace_vlm.engine.layers import linears_of
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.kernels.cpu import why_not
from grace_vlm.kernels.int4pack import Int4PackLinear
from grace_vlm.kernels.low_bit_cpu import PanelLinear
from grace_vlm.models.load import LoadedModel
from grace_vlm.quant.affine import dequantize, quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu" or why_not() is not None, reason=f"needs the kernel: {why_not()}")
EXACT = EngineOptions(cpu_activations="fp32")
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=1)
TEXTS = ["what is it?", "yes", "how many are there to the left of the large green one?"]


def on_a_grid(family: str, bits: int) -> tuple[LoadedModel, Mapping[str, QuantizedTensor]]:
    """A toy whose decoder linears lie on a grid, and their codes."""
    loaded, codes = loaded_toy(family), {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, nn.Linear) and "language_model" in name:
            scheme = QuantScheme(bits, 32)
            weight = module.weight.detach()
            codes[name] = quantize_tensor(weight, minmax_scale(weight, scheme), scheme)
            exact = dequantize(codes[name].codes, codes[name].scale.float(), torch.float32)
            module.weight = nn.Parameter(exact, requires_grad=False)
    return loaded, codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["tiny", "qwen2_vl", "llava"])
def test_codes_answer_as_their_weights_do(family: str, bits: int) -> None:
    loaded, codes = on_a_grid(family, bits)
    plain = LLM(copy.deepcopy(loaded)).generate(TEXTS, sampling=PARAMS)
    exact, fast = (LLM(copy.deepcopy(loaded), "cpu", options, codes) for options in (EXACT, EngineOptions()))
    for layer in (*exact.engine.weights.layers, *fast.engine.weights.layers):
        assert all(isinstance(linear.weight, PanelLinear) for linear in linears_of(layer))
    for answer, right in zip(exact.generate(TEXTS, sampling=PARAMS), plain, strict=True):
        assert answer.token_ids == right.token_ids
        for a, b in zip(answer.choices, right.choices, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    away = [
        abs(a.choices[0].logprob - b.choices[0].logprob)
        for a, b in zip(fast.generate(TEXTS, sampling=PARAMS), plain, strict=True)
    ]
    assert 1e-6 < max(away) < 0.1, "bytes are near, and not the same"


@pytest.mark.parametrize("family", ["tiny", "qwen2_vl", "llava"])
def test_all_layers_in_one_call(family: str) -> None:
    """As layer by layer from Python: norms of heads, biases, one row and several."""
    loaded, codes = on_a_grid(family, 4)
    engine = LLM(loaded, "cpu", EXACT, codes).engine
    weights, step = engine.weights, engine.decode
    assert step._in_one_call is not None
    for rows in (1, 4):
        x = torch.randn(rows, weights.width)
        step._table[:rows, :3] = torch.arange(rows * 3).view(rows, 3)
        step._lengths[:rows] = torch.tensor([33, 0, 15, 16])[:rows]
        rotation = weights.rotary(x, step._lengths[:rows].long().expand(3, -1))
        engine.cache.keys.normal_(), engine.cache.values.normal_()
        right = step._layer_by_layer(x.clone(), rotation)
        kept = engine.cache.keys.clone(), engine.cache.values.clone()
        found = step._in_one_call(x.clone(), rotation, step._table[:rows], step._lengths[:rows])
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
        for a, b in zip(kept, (engine.cache.keys, engine.cache.values), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_machine_without_a_compiler_has_torchs_operator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, codes = on_a_grid("tiny", 4)
    right = LLM(copy.deepcopy(loaded), "cpu", EXACT, codes).generate(TEXTS, sampling=PARAMS)
    monkeypatch.setattr(layers, "missing", lambda: "there is no C compiler")
    layers._say_once.cache_clear()
    plain, torchs = (LLM(copy.deepcopy(loaded), "cpu", options, codes) for options in (EXACT, None))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "there is no C compiler: 4-bit weights run by torch's own operator in BF16, or in FP32 with "
        "cpu_activations=fp32; others in FP32"
    ]
    assert isinstance(plain.engine.weights.layers[0].down.weight, torch.Tensor)
    assert [a.token_ids for a in plain.generate(TEXTS, sampling=PARAMS)] == [a.token_ids for a in right]
    weights = torchs.engine.weights
    assert all(isinstance(linear.weight, Int4PackLinear) for linear in linears_of(weights.layers[0]))
    assert weights.num_bytes < plain.engine.weights.num_bytes
    answers = torchs.generate(TEXTS, sampling=PARAMS)
    away = [abs(a.choices[0].logprob - b.choices[0].logprob) for a, b in zip(answers, right, strict=True)]
    assert 1e-6 < max(away) < 0.1, "BF16 is near, and not the same"
    # 8 bits are not for it.
    loaded, codes = on_a_grid("tiny", 8)
    assert isinstance(LLM(loaded, "cpu", None, codes).engine.weights.layers[0].down.weight, torch.Tensor)


def test_a_request_is_the_same_to_the_last_bit_beside_others() -> None:
    """With activations in bytes, one scale a token: what runs beside it enters nothing."""
    options = EngineOptions(max_running=4, batch_invariant=True, int8_head=True)
    loaded, codes = on_a_grid("tiny", 4)
    crowd, alone = (LLM(copy.deepcopy(loaded), "cpu", options, codes) for _ in range(2))
    together = crowd.generate(TEXTS * 3, sampling=PARAMS)
    assert together == [alone.generate([text], sampling=PARAMS)[0] for text in TEXTS * 3]
