"""The adapter against stock Transformers: same tower, same positions, same logits, same tap."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from toy_world import SIZES, World

from grace_vlm.errors import ConfigError
from grace_vlm.models.adapter import linear_shapes
from grace_vlm.models.qwen3_vl import _grid_tables
from grace_vlm.models.registry import adapter_for

MIXED = [
    ["<128x128>", "is there a red circle?"],
    ["what shape is in the picture? yes no yes no"],
    ["a blue triangle", "<64x200>", "what shape is in the picture?"],
    ["<256x256>", "yes"],
    ["<128x128>", "no"],
]


@torch.no_grad()
def our_states(world: World, inputs: Any, tap: int | None = None, with_mask: bool = False) -> Any:
    vision = world.adapter.tower(world.model, world.pixels(inputs), world.grids(inputs))
    return world.adapter.decode(
        world.model,
        inputs["input_ids"],
        world.positions(inputs),
        vision,
        attention_mask=inputs["attention_mask"] if with_mask else None,
        tap=tap,
    )


@torch.no_grad()
def stock(world: World, inputs: Any) -> Any:
    return world.model(**inputs, output_hidden_states=True, use_cache=False)


@pytest.mark.parametrize("row", [*MIXED, ["<160x128>", "yes", "<64x200>", "no", "<160x128>"]])
def test_logits_of_a_row_are_stock_transformers_bit_for_bit(world: World, row: list[str]) -> None:
    inputs = world.inputs([row])
    ours = world.adapter.head(world.model)(our_states(world, inputs).last)
    expected = stock(world, inputs).logits
    assert ours.shape == expected.shape
    assert expected.std() > 0.5  # not a constant
    assert float((ours - expected).detach().abs().max()) == 0.0


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_of_a_padded_batch_are_stock_transformers_bit_for_bit(world: World, padding_side: str) -> None:
    inputs = world.inputs(MIXED, padding_side)
    assert bool((inputs["attention_mask"] == 0).any())
    ours = world.adapter.head(world.model)(our_states(world, inputs, with_mask=True).last)
    real = inputs["attention_mask"].bool()
    assert float((ours - stock(world, inputs).logits)[real].detach().abs().max()) == 0.0


def test_right_padding_needs_no_mask(world: World) -> None:
    """Causal attention never lets a real token see a pad; another kernel runs, so the last digits may differ."""
    inputs = world.inputs(MIXED)
    ours = world.adapter.head(world.model)(our_states(world, inputs).last)
    expected = stock(world, inputs).logits
    real = inputs["attention_mask"].bool()
    assert float((ours - expected)[real].detach().abs().max()) <= 1e-5 * float(expected[real].abs().max())


@pytest.mark.parametrize("tap", [-2, -3])
def test_the_tap_is_output_hidden_states_at_the_visual_tokens(world: World, tap: int) -> None:
    inputs = world.inputs(MIXED)
    states = our_states(world, inputs, tap=tap, with_mask=True)
    expected = stock(world, inputs).hidden_states[tap]
    visual = inputs["input_ids"] == world.model.config.image_token_id
    merge = world.model.config.vision_config.spatial_merge_size
    assert states.relational.shape[0] == sum(t * h * w for t, h, w in world.grids(inputs)) // merge**2
    assert torch.equal(states.relational, expected[visual])


@pytest.mark.parametrize(("tap", "layer"), [(0, 0), (1, 1), (3, 3), (-2, 3), (-5, 0)])
def test_the_tap_is_what_enters_a_layer_of_the_stock_model(world: World, tap: int, layer: int) -> None:
    """After DeepStack's addition, where one was made (before layer 1 here; hidden_states[1] is without it)."""
    inputs = world.inputs(MIXED[:1])
    entered: list[torch.Tensor] = []
    layers = world.model.model.language_model.layers
    handle = layers[layer].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    stock(world, inputs)
    handle.remove()
    visual = inputs["input_ids"] == world.model.config.image_token_id
    assert torch.equal(our_states(world, inputs, tap=tap).relational, entered[0][visual])


def test_no_tap_no_relational_features_and_no_hook_left(world: World) -> None:
    inputs = world.inputs(MIXED[:1])
    assert our_states(world, inputs).relational is None
    our_states(world, inputs, tap=-2)
    assert all(not layer._forward_pre_hooks for layer in world.model.model.language_model.layers)


@pytest.mark.parametrize(
    "rows",
    [
        [["what shape is in the picture?"]],
        [["<128x128>", "yes"]],
        [["<64x200>"]],
        [["yes", "<160x128>", "no", "<256x256>", "<128x128>", "a blue triangle"]],
        MIXED,
    ],
)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_positions_are_those_of_get_rope_index(world: World, rows: list[list[str]], padding_side: str) -> None:
    inputs = world.inputs(rows, padding_side)
    expected, _ = world.model.model.get_rope_index(
        input_ids=inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    real = inputs["attention_mask"].bool()
    assert torch.equal(world.positions(inputs)[:, real], expected[:, real].long())


def test_positions_of_text_alone_count_from_zero(world: World) -> None:
    ids = np.array([5, 6, 7, 8])
    assert world.adapter.positions(world.model.config, ids, []).tolist() == [[0, 1, 2, 3]] * 3


def test_tower_in_batches_of_one_grid_is_the_stock_tower_picture_by_picture(world: World) -> None:
    inputs = world.inputs([[f"<{w}x{h}>" for w, h in SIZES]])
    grids = world.grids(inputs)
    assert len(set(grids)) == 4
    with torch.no_grad():
        ours = world.adapter.tower(world.model, world.pixels(inputs), grids)
        for output, pixels, grid in zip(ours, world.pixels(inputs), grids, strict=True):
            expected = world.model.model.visual(pixels, grid_thw=torch.tensor([grid]))
            assert torch.equal(output.hidden, expected.last_hidden_state)
            assert len(output.deepstack) == len(expected.deepstack_features) == 1
            assert torch.equal(output.deepstack[0], expected.deepstack_features[0])
            assert output.deepstack[0].shape[0] == world.adapter.num_visual_tokens(world.model.config, grid)
            assert output.num_bytes == 4 * (output.hidden.numel() + output.deepstack[0].numel())


def test_pictures_of_one_grid_do_not_see_each_other(world: World) -> None:
    inputs = world.inputs([["<128x128>", "<128x128>", "<128x128>"]])
    pixels, grids = world.pixels(inputs), world.grids(inputs)
    with torch.no_grad():
        before = world.adapter.tower(world.model, pixels, grids)
        after = world.adapter.tower(world.model, [pixels[0], pixels[1] * 0 + 1, pixels[2]], grids)
    assert torch.equal(before[0].hidden, after[0].hidden)
    assert torch.equal(before[2].hidden, after[2].hidden)
    assert not torch.equal(before[1].hidden, after[1].hidden)


def test_the_tower_leaves_the_stock_attention_in_place(world: World) -> None:
    visual = world.model.model.visual
    name = visual.config._attn_implementation
    inputs = world.inputs([["<128x128>"]])
    with torch.no_grad():
        world.adapter.tower(world.model, world.pixels(inputs), world.grids(inputs))
    assert visual.config._attn_implementation == name
    with pytest.raises(RuntimeError), torch.no_grad():
        world.adapter.tower(world.model, [torch.zeros(3, 5)], [(1, 8, 8)])
    assert visual.config._attn_implementation == name


def test_gradient_reaches_the_merger_and_the_words_but_not_the_tower(world: World) -> None:
    inputs = world.inputs(MIXED[:1])
    with torch.no_grad():
        vision = world.adapter.tower(world.model, world.pixels(inputs), world.grids(inputs))
    world.model.zero_grad()
    states = world.adapter.decode(world.model, inputs["input_ids"], world.positions(inputs), vision)
    states.last.sum().backward()
    grads = {name for name, p in world.model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    world.model.zero_grad()
    assert any(name.startswith("model.visual.merger.") for name in grads)
    assert "model.language_model.embed_tokens.weight" in grads
    assert not any(name.startswith(world.adapter.frozen) for name in grads)


def test_a_model_that_was_trained_still_masks_padding_in_its_own_forward(world: World) -> None:
    """A training forward leaves its attention in the configuration; ``generate`` after it must not attend to pads."""
    inputs = world.inputs(MIXED, "left")
    before = stock(world, inputs).logits
    some = world.inputs(MIXED[:1])
    with torch.no_grad():
        vision = world.adapter.tower(world.model, world.pixels(some), world.grids(some))
    config = world.model.model.language_model.config
    name = config._attn_implementation
    world.adapter.decode(world.model, some["input_ids"], world.positions(some), vision)
    assert config._attn_implementation != "sdpa"
    real = inputs["attention_mask"].bool()
    answers = world.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(stock(world, inputs).logits[real], before[real])
    config._attn_implementation = name
    assert torch.equal(answers, world.model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_a_tower_first_asked_in_inference_mode_can_be_trained(world: World) -> None:
    _grid_tables.cache_clear()
    inputs = world.inputs([["<128x128>"]])
    pixels, grids = world.pixels(inputs), world.grids(inputs)
    with torch.inference_mode():
        world.adapter.tower(world.model, pixels, grids)
    assert not any(table.is_inference() for table in _grid_tables(grids[0], 16, 2, torch.device("cpu")).values())
    embedding = world.model.model.visual.pos_embed.weight
    world.adapter.tower(world.model, pixels, grids)[0].hidden.sum().backward()
    assert embedding.grad is not None
    assert float(embedding.grad.abs().sum()) > 0
    world.model.zero_grad(set_to_none=True)


def test_frozen_names_are_tower_and_deepstack_and_quantizable_the_decoder(world: World) -> None:
    names = [name for name, _ in world.model.named_parameters()]
    assert all(any(name.startswith(prefix) for name in names) for prefix in world.adapter.frozen)
    trained = [name for name in names if not name.startswith(world.adapter.frozen)]
    assert all(name.startswith(("model.language_model.", "model.visual.merger.", "lm_head")) for name in trained)
    shapes = linear_shapes(world.model, world.adapter.parts)
    quantized = [name for name in shapes if re.fullmatch(world.adapter.parts["language"], name)]
    assert len(quantized) == 7 * 4
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    embedding = "model.language_model.embed_tokens"
    size = (world.model.config.text_config.vocab_size, 128)
    assert shapes["lm_head"] == (*size, "head", embedding, False)
    assert shapes[embedding] == (*size, "head", None, True)


def test_a_cache_gives_the_logits_of_the_whole(world: World) -> None:
    from transformers import DynamicCache

    inputs = world.inputs(MIXED[2:3])
    ids, positions = inputs["input_ids"], world.positions(inputs)
    cut = ids.shape[1] - 3
    with torch.no_grad():
        vision = world.adapter.tower(world.model, world.pixels(inputs), world.grids(inputs))
        whole = world.adapter.decode(world.model, ids, positions, vision).last
        cache = DynamicCache(config=world.model.config.text_config)
        first = world.adapter.decode(world.model, ids[:, :cut], positions[:, :, :cut], vision, cache=cache).last
        rest = world.adapter.decode(world.model, ids[:, cut:], positions[:, :, cut:], [], cache=cache).last
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)


def test_an_architecture_without_an_adapter_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        adapter_for("gpt2")
    assert str(caught.value) == (
        "model type 'gpt2' has no adapter; supported: llava, qwen2_5_vl, qwen2_vl, qwen3_vl "
        "(docs/extending.md: a new one is one file)"
    )


def test_a_mixture_of_experts_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        adapter_for("qwen3_vl_moe")
    assert str(caught.value) == (
        "model type 'qwen3_vl_moe' is a mixture of experts, which is not supported: its experts are no linear layers "
        "that a grid applies to; use a dense model (llava, qwen2_5_vl, qwen2_vl, qwen3_vl)"
    )
