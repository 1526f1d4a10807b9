"""Block reconstruction: no worse than rounding, better with passes, and nothing but linears moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from calibrated_toys import load_toy, replay_of

from grace_vlm.errors import NonFiniteError
from grace_vlm.ptq.block import reconstruct_layer
from grace_vlm.ptq.replay import Replay
from grace_vlm.quant import QuantScheme, bake
from grace_vlm.quant.affine import quantize_tensor
from grace_vlm.quant.scale_init import mse_scale
from grace_vlm.quant.scheme import parse_scheme

LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
SCHEMES: dict[str, QuantScheme] = dict.fromkeys(LINEARS, parse_scheme("w4g64"))  # type: ignore[arg-type]


def reconstructed(folder: Path, num_passes: int, schemes: dict[str, QuantScheme] = SCHEMES) -> tuple[Replay, float]:
    """A toy whose first layer was reconstructed, and how far that layer is off."""
    replay = replay_of(load_toy("Qwen3-VL", torch.float32), folder)
    before = [replay.run(0, batch)[1] for batch in range(len(replay.forwards))]
    norms = [p.clone() for name, p in replay.layers[0].named_parameters() if "norm" in name]
    rounded = {name: replay.layers[0].get_submodule(name).weight.detach().clone() for name in LINEARS}
    found = reconstruct_layer(replay, 0, schemes, "mse", {}, num_passes)
    assert all(
        torch.equal(p, kept)
        for p, kept in zip((p for n, p in replay.layers[0].named_parameters() if "norm" in n), norms, strict=True)
    )
    for name, tensor in found.items():
        assert "forward" not in vars(replay.layers[0].get_submodule(name))
        assert torch.equal(replay.layers[0].get_submodule(name).weight, bake(tensor).float())
        if num_passes == 0:
            plain = quantize_tensor(rounded[name], mse_scale(rounded[name], schemes[name]), schemes[name])
            assert torch.equal(tensor.codes, plain.codes)
            assert torch.equal(tensor.scale, plain.scale)
    return replay, sum(float(F.mse_loss(replay.run(0, batch)[1], x)) for batch, x in enumerate(before))


@pytest.mark.parametrize(("scheme", "gain"), [("w2g64", 1.2), ("w4g64", 1.2), ("w8g64", 1.02)])
def test_passes_bring_a_layer_nearer_to_what_it_gave(tmp_path: Path, scheme: str, gain: float) -> None:
    """Without any it is the rounded layer. Rates are in steps of the grid, so what serves two bits serves eight."""
    schemes: dict[str, QuantScheme] = dict.fromkeys(LINEARS, parse_scheme(scheme))  # type: ignore[arg-type]
    errors = [reconstructed(tmp_path, num_passes, schemes)[1] for num_passes in (0, 5, 40)]
    assert errors[0] > gain * errors[1] > gain * errors[2] > 0, errors


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    replay = replay_of(load_toy("Qwen3-VL", torch.float32), tmp_path)
    with torch.no_grad():
        replay.layers[0].input_layernorm.weight[0] = torch.nan
    assert reconstruct_layer(replay, 0, {}, "mse", {}) == {}
    with pytest.raises(NonFiniteError, match=r"layers\.0 gives NaN or Inf"):
        reconstruct_layer(replay, 0, SCHEMES, "mse", {})
