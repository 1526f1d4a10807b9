"""Every family through its adapter answers as Transformers' own model does, padded, packed and picture by picture."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from toy_world import TEXTS, picture

from grace_vlm.data.collate import Batch, collate
from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import Picture, patchify_of
from grace_vlm.data.rows import Row, Turn
from grace_vlm.models.adapter import Adapter, linear_shapes, stored_name
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.toy import build_toy_model, build_toy_processor

FILE = "model.safetensors"

SIZES = ("tiny", "qwen2_vl", "qwen2_5_vl", "llava")


class Family:
    """A toy model of one family with its processor, and rows encoded for it."""

    def __init__(self, size: str) -> None:
        self.processor = build_toy_processor(TEXTS * 4, size=size)
        self.model = build_toy_model(size, self.processor, seed=3).eval()
        with torch.no_grad():
            self.model.get_input_embeddings().weight.mul_(3)
        self.adapter: Adapter = adapter_for(self.model.config.model_type)
        self.encoder = Encoder(self.processor, self.adapter, self.model.config)
        self.patchify = patchify_of(self.adapter, self.model.config, self.processor)

    def batch(self, rows: list[tuple[tuple[str, ...], list[Any]]], layout: Any) -> Batch:
        """Rows given as (texts of the turns, pictures)."""
        samples, pictures, lengths = [], [], []
        for number, (texts, images) in enumerate(rows):
            turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
            names = tuple(f"{number}-{i}" for i in range(len(images)))
            made = self.patchify(images) if images else []
            samples.append(self.encoder.encode(Row(number, str(number), names, turns), [grid for grid, _ in made]))
            for name, (grid, pixels) in zip(names, made, strict=True):
                pictures.append(Picture(name, grid, pixels))
                lengths.append(self.adapter.num_visual_tokens(self.model.config, grid))
        return collate(samples, pictures, lengths, self.processor.tokenizer.pad_token_id, layout)

    def hidden(self, batch: Batch, tap: int | None = None) -> Any:
        vision = []
        if batch.pictures:
            pixels = [p.pixels for p in batch.pictures if p.pixels is not None]
            vision = self.adapter.tower(self.model, pixels, [p.grid for p in batch.pictures])
        return self.adapter.decode(
            self.model, batch.input_ids, batch.position_ids, vision,
            attention_mask=batch.attention_mask, tap=tap, segments=batch.segments,
        )  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def rows() -> list[tuple[tuple[str, ...], list[Any]]]:
    return [
        (("<image>\nwhat shape is in the picture?", "a blue triangle"), [picture(128, 160, 0)]),
        (("is there a red circle?", "no", "why?", "it is blue"), []),
        (
            ("left <image> right <image>: same?", "yes", "and <image>", "no"),
            [picture(s, 140, s) for s in (128, 224, 150)],
        ),
    ]


def messages(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    out = []
    for number, text in enumerate(texts):
        content: list[dict[str, str]] = []
        for at, part in enumerate(text.split("<image>")):
            content += [{"type": "image"}] * (at > 0) + [{"type": "text", "text": part.strip()}] * bool(part.strip())
        out.append({"role": ("user", "assistant")[number % 2], "content": content})
    return out


def test_ids_and_logits_are_the_stock_models(family: Family) -> None:
    for texts, images in rows():
        batch = family.batch([(texts, images)], "right")
        rendered = family.processor.apply_chat_template(messages(texts), tokenize=False)
        stock = family.processor(text=[rendered], images=images or None, return_tensors="pt")
        assert batch.input_ids.tolist() == stock["input_ids"].tolist()
        with torch.no_grad():
            expected = family.model(**stock).logits
            found = family.adapter.head(family.model)(family.hidden(batch).last)
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
        assert bool((found.argmax(-1) == expected.argmax(-1)).all())


@torch.no_grad()
def test_packed_rows_are_what_they_are_alone(family: Family) -> None:
    packed, padded = family.batch(rows(), "packed"), family.batch(rows(), "right")
    assert packed.input_ids.shape == (1, sum(packed.segments or ()))
    assert packed.targets.tolist() == padded.targets.tolist()
    whole = family.hidden(packed, tap=-2)
    start = 0
    tapped = []
    for number, row in enumerate(rows()):
        alone = family.hidden(family.batch([row], "right"), tap=-2 if row[1] else None)
        length = alone.last.shape[1]
        assert (packed.segments or ())[number] == length
        torch.testing.assert_close(whole.last[0, start : start + length], alone.last[0], rtol=1e-4, atol=1e-5)
        start += length
        if alone.relational is not None:
            tapped.append(alone.relational)
    torch.testing.assert_close(whole.relational, torch.cat(tapped), rtol=1e-4, atol=1e-5)
    # The states that are supervised are the same ones, in the same order.
    beside = family.hidden(padded).last.flatten(0, 1)[padded.supervised]
    torch.testing.assert_close(whole.last.flatten(0, 1)[packed.supervised], beside, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_sample_of_a_pack_sees_another(family: Family) -> None:
    first, second, third = rows()
    other = (("is there a blue circle?", "yes", "really?", "yes!"), [])
    before, after = (
        family.hidden(family.batch([first, middle, third], "packed")).last[0] for middle in (second, other)
    )
    ends = [family.batch([row], "right").input_ids.shape[1] for row in (first, third)]
    assert torch.equal(before[: ends[0]], after[: ends[0]])
    assert torch.equal(before[-ends[1] :], after[-ends[1] :])
    assert family.hidden(family.batch([first], "right")).last.abs().sum() > 0


def test_checkpointed_packed_layers_attend_alike_in_the_backward_pass(family: Family) -> None:
    """Recomputation must find the same attention: the gradients with and without it are equal."""
    batch = family.batch(rows(), "packed")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            family.model.gradient_checkpointing_enable({"use_reentrant": False})
            family.model.train()
        loss = family.hidden(batch).last.square().mean()
        # Another forward in between, as evaluation or a second model would: it must not change what is recomputed.
        with torch.no_grad():
            family.hidden(family.batch(rows()[:1], "left"))
        loss.backward()
        gradients.append([p.grad.clone() for p in family.model.parameters() if p.grad is not None])
        family.model.zero_grad()
    family.model.gradient_checkpointing_disable()
    family.model.eval()
    family.model.set_attn_implementation("sdpa")
    assert len(gradients[0]) == len(gradients[1]) > 10
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-7)


def test_greedy_answers_are_generates(family: Family) -> None:
    from grace_vlm.engine.engine import Engine
    from grace_vlm.engine.request import EngineImage, Prompt
    from grace_vlm.engine.sampling import SamplingParams
    from grace_vlm.models.load import LoadedModel

    texts, images = rows()[0]
    rendered = family.processor.apply_chat_template(messages(texts[:1]), tokenize=False, add_generation_prompt=True)
    stock = family.processor(text=[rendered], images=images, return_tensors="pt")
    expected = family.model.generate(**stock, max_new_tokens=6, do_sample=False)[0, stock["input_ids"].shape[1] :]
    turns = (Turn("user", texts[0]), Turn("assistant", ""))
    made = family.patchify(images)
    sample = family.encoder.prompt(Row(0, "0", ("a",), turns), [grid for grid, _ in made])
    engine = Engine(LoadedModel(copy.deepcopy(family.model), family.processor, family.adapter, "toy"))
    prompt = Prompt(sample.input_ids, sample.positions, sample.visual, [EngineImage(*made[0])])
    found: dict[str, list[int]] = {"a": [], "b": []}
    for name in found:
        engine.add(name, prompt, SamplingParams(max_tokens=6))
    while engine.has_work:
        for event in engine.step():
            if event.choice:
                found[event.request_id].append(event.choice.token)
    stop = family.model.generation_config.eos_token_id
    assert found["a"] == found["b"] == [token for token in expected.tolist() if token != stop]


def test_every_part_is_named_and_no_linear_is_forgotten(family: Family) -> None:
    shapes = linear_shapes(family.model, family.adapter.parts)
    assert {shape.part for shape in shapes.values()} == {"language", "projector", "tower", "head"}
    assert sum(shape.part == "language" for shape in shapes.values()) == 7 * 2
    names = [name for name, _ in family.model.named_parameters()]
    assert all(any(name.startswith(prefix) for name in names) for prefix in family.adapter.frozen)


def test_stored_names_are_those_that_transformers_reads(family: Family, tmp_path: Any) -> None:
    """And, but for LLaVA's tower (the hub's name of it is older), those that it writes."""
    from safetensors.torch import load_file, save_file

    family.model.save_pretrained(tmp_path)
    written = {name.replace("vision_tower.", "vision_tower.vision_model.") for name in load_file(tmp_path / FILE)}
    parameters = dict(family.model.named_parameters())
    ours = {stored_name(family.adapter, name): tensor.detach() for name, tensor in parameters.items()}
    assert ours.keys() == written
    save_file(ours, tmp_path / FILE, metadata={"format": "pt"})
    read, info = type(family.model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in read.named_parameters())


def test_positions_of_every_axis(family: Family) -> None:
    batch = family.batch(rows()[2:], "right")
    assert batch.position_ids.shape == (3, 1, batch.input_ids.shape[1])
    if not hasattr(family.model.model, "get_rope_index"):
        expected = np.broadcast_to(np.arange(batch.input_ids.shape[1]), (3, batch.input_ids.shape[1]))
        assert np.array_equal(batch.position_ids[:, 0].numpy(), expected)
        return
    types = (batch.input_ids == family.adapter.image_token_id(family.model.config)).int()
    grids = torch.tensor([p.grid for p in batch.pictures])
    expected, _ = family.model.model.get_rope_index(
        input_ids=batch.input_ids, mm_token_type_ids=types, image_grid_thw=grids,
        attention_mask=torch.ones_like(batch.input_ids),
    )  # fmt: skip
    assert torch.equal(batch.position_ids, expected)


def test_a_sliding_window_that_a_row_exceeds_is_refused() -> None:
    from grace_vlm.errors import ConfigError
    from grace_vlm.models.decoder import attend_segments

    states = torch.zeros(1, 2, 9, 8)
    module = torch.nn.Identity()
    out, _ = attend_segments(module, states, states, states, None, segments=(4, 5), sliding_window=5)
    assert out.shape == (1, 9, 2, 8)
    with pytest.raises(ConfigError, match="a sliding window of 4 tokens and a row has 5"):
        attend_segments(module, states, states, states, None, segments=(4, 5), sliding_window=4)


def test_many_pictures_are_prepared_as_one_is(family: Family) -> None:
    """LLaVA's go to the image processor some at a time."""
    images = [picture(128, 96 + 32 * (seed % 2), seed) for seed in range(35)]
    together = family.patchify(images)
    assert len(together) == 35
    for image, (grid, pixels) in zip(images, together, strict=True):
        ((own_grid, own_pixels),) = family.patchify([image])
        assert own_grid == grid
        assert torch.equal(own_pixels, pixels)
