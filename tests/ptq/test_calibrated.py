"""AWQ and GPTQ on whole models: every family, the command, the folder it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_toys import FAMILIES, load_toy, replay_of
from toy_run import write_models, write_rows

from grace_vlm.errors import ConfigError, NonFiniteError
from grace_vlm.formats.folder import read_grid
from grace_vlm.formats.weights import open_weights
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.load import load_model
from grace_vlm.ptq.calibration import Calibration, calibration_entries, calibration_replay
from grace_vlm.ptq.layers import quantize_layers
from grace_vlm.ptq.quantize import quantize_folder
from grace_vlm.ptq.replay import Replay
from grace_vlm.ptq.rtn import round_to_nearest
from grace_vlm.quant import QuantScheme, bake


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    write_rows(folder, num_rows=12)
    write_models(folder)
    return folder


def states(replay: Replay) -> torch.Tensor:
    """What the last layer makes of all rows by the model's own forward, (tokens, d)."""
    return torch.cat([forward().last[0] for forward in replay.forwards])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_errs_less_than_rounding(family: str, world: Path) -> None:
    """At 8 bits: at 4 these toys with their loud channels are mostly noise."""
    errors = {}
    for method in ("rtn", "awq", "gptq", "block"):
        loaded = load_toy(family, torch.float32)
        plan = plan_model(loaded.model, loaded.adapter, "w8g64")
        replay = replay_of(loaded, world)
        before = states(replay)
        if method == "rtn":
            quantized = round_to_nearest(loaded.model, plan, "mse")
        else:
            seen: list[tuple[int, int]] = []
            quantized = quantize_layers(
                loaded.model, plan.schemes, replay, method, "mse", lambda *step, seen=seen: seen.append(step)
            )
            assert seen == [(1, 2), (2, 2)]
        assert list(quantized) == list(plan.schemes)
        for name, tensor in quantized.items():
            weight = loaded.model.get_submodule(name).weight
            assert torch.equal(weight, bake(tensor).float()), name
        errors[method] = float((states(replay) - before).norm() / before.norm())
    assert errors["awq"] < 0.9 * errors["rtn"], errors
    assert errors["gptq"] < 0.6 * errors["rtn"], errors
    assert errors["block"] < 0.9 * errors["rtn"], errors


@torch.no_grad()
def test_a_layer_sees_what_the_ones_before_it_make_now(world: Path) -> None:
    """The replay cuts them short, and must give the states of a whole forward, DeepStack and all."""
    loaded = load_toy("Qwen3-VL", torch.float32)
    replay = replay_of(loaded, world)
    last: list[torch.Tensor] = []
    replay.advance(0)
    replay.layers[0].mlp.up_proj.weight.mul_(1.5)
    stale = replay.run(1, 0)[1]
    replay.advance(0)
    hook = replay.layers[1].register_forward_hook(lambda _module, _args, output: last.append(output))
    replay.forwards[0]()
    hook.remove()
    assert torch.equal(replay.run(1, 0)[1], last[0])
    assert not torch.equal(stale, last[0])


def test_a_linear_in_bf16_is_left_alone(world: Path) -> None:
    """Neither it nor what it shares a fold with changes; a linear outside the layers is refused."""
    loaded = load_toy("Qwen3-VL", torch.float32)
    replay = replay_of(loaded, world)
    layer = replay.layers[0]
    schemes = dict(plan_model(loaded.model, loaded.adapter, "w4g64").schemes)
    del schemes[f"{replay.names[0]}.self_attn.v_proj"]
    kept = [layer.input_layernorm.weight.clone(), layer.self_attn.v_proj.weight.clone()]
    quantize_layers(loaded.model, schemes, replay, "awq", "minmax")
    assert torch.equal(layer.input_layernorm.weight, kept[0])
    assert torch.equal(layer.self_attn.v_proj.weight, kept[1])
    with pytest.raises(ConfigError, match=r"^gptq knows no input of lm_head; it takes linears of decoder layers$"):
        quantize_layers(loaded.model, {"lm_head": QuantScheme(4, 64)}, replay, "gptq", "mse")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_model_that_computes_nan_is_refused(method: Any, world: Path) -> None:
    loaded = load_toy("LLaVA-1.5", torch.float32)
    replay = replay_of(loaded, world)
    with torch.no_grad():
        replay.layers[1].input_layernorm.weight[3] = torch.nan
    schemes = plan_model(loaded.model, loaded.adapter, "w4g64").schemes
    line = "^calibration gave NaN or Inf in the inputs of a linear; look at the model and its rows$"
    with pytest.raises(NonFiniteError, match=line):
        quantize_layers(loaded.model, schemes, replay, method, "mse")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_command_pack_verify(method: str, world: Path, tmp_path: Path, grace: Any) -> None:
    target, packed = tmp_path / method, tmp_path / "packed"
    rows = ["--calibration", world / "rows.jsonl", "--num-rows", 8, "--seed", 3]
    code, out, err = grace(
        "quantize", world / "student", target, "--scheme", "w4g64", "--method", method, *rows, "--json"
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["model"], document["quantized"]) == (str(target), 14)
    card = (target / "README.md").read_text()
    assert f"Quantized by {method.upper()} (mse scales, 8 rows of `rows.jsonl`, seed 3)" in card
    assert grace("pack", target, packed)[0] == 0
    assert grace("verify", target, packed)[1].startswith("equal")
    assert grace("eval", packed, "--data", world / "rows.jsonl", "--limit", 2)[0] == 0
    grid, weights = read_grid(target), open_weights(target)
    assert len(grid) == 14
    for name, tensor in grid.items():
        assert torch.equal(weights[f"{name}.weight"], bake(tensor))


def test_same_rows_same_bytes_other_rows_other_codes(world: Path, tmp_path: Path) -> None:
    codes = []
    for number, seed in enumerate((0, 0, 1)):
        calibration = Calibration(world / "rows.jsonl", num_rows=3, seed=seed)
        quantize_folder(str(world / "student"), tmp_path / f"{number}", "w4g64", method="gptq", calibration=calibration)
        codes.append({name: tensor.codes for name, tensor in read_grid(tmp_path / f"{number}").items()})
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert any(not torch.equal(codes[0][name], codes[2][name]) for name in codes[0])


def test_rows_are_batched_by_tokens_and_draw_no_more_than_asked(world: Path) -> None:
    loaded = load_model(str(world / "student"), "cpu")
    entries = calibration_entries(loaded, Calibration(world / "rows.jsonl", num_rows=5))
    assert len(entries) == 5
    assert len({entry[0].id for entry in entries}) == 5
    long = entries * 40
    tokens = sum(entry[1].num_tokens for entry in long)
    replay = calibration_replay(loaded, long)
    assert len(replay.forwards) >= tokens / 2048
    assert sum(len(forward().last[0]) for forward in replay.forwards) == tokens


def test_what_it_refuses(world: Path, tmp_path: Path, grace: Any) -> None:
    source, rows, target = world / "student", world / "rows.jsonl", tmp_path / "out"

    def refuses(exit_code: int, line: str, *args: object) -> None:
        found = grace("quantize", source, target, "--scheme", "w4g64", *args)
        assert found == (exit_code, "", f"error: {line}\n")
        assert not target.exists()

    refuses(2, "method 'obq' is not one of rtn, awq, gptq, block", "--method", "obq")
    for method in ("awq", "gptq", "block"):
        line = f"method {method} needs rows to calibrate on; give --calibration FILE"
        refuses(2, line, "--method", method)
    refuses(2, "method rtn takes no --calibration; leave it out", "--calibration", rows)
    line = "--num-rows, --device is of a calibration; give --calibration FILE with --method awq, gptq or block"
    refuses(2, line, "--num-rows", 3, "--device", "cpu")
    line = "num-rows is 0; at least 1 is needed to calibrate on"
    refuses(2, line, "--method", "gptq", "--calibration", rows, "--num-rows", 0)
    line = "nowhere.jsonl is no file; a JSON array or JSONL file of LLaVA rows is expected"
    refuses(3, line, "--method", "awq", "--calibration", "nowhere.jsonl")
    line = f"{tmp_path}/no is no folder; the folder that image paths are relative to is expected"
    refuses(3, line, "--method", "awq", "--calibration", rows, "--images", tmp_path / "no")
    target.mkdir()
    (target / "x").touch()
    found = grace("quantize", source, target, "--scheme", "w4g64", "--method", "gptq", "--calibration", rows)
    assert found == (5, "", f"error: {target} already exists; choose another path or pass --overwrite\n")
