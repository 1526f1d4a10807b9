"""One model in every layout that we write: the engine reads each of them, and answers alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import loaded_toy

from grace_vlm.engine.llm import LLM
from grace_vlm.engine.open import open_model
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import ConfigError, FormatError
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import converters
from grace_vlm.ptq.quantize import quantize_folder

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
TEXTS = ["what is it?", "yes", "how many are there to the left of the large green one?"]


@pytest.fixture(scope="module", params=["student", "qwen2_vl", "llava"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy on a grid, as a model folder."""
    made = tmp_path_factory.mktemp(request.param)
    loaded = loaded_toy(request.param)
    loaded.model.bfloat16().save_pretrained(made / "model")
    loaded.processor.save_pretrained(made / "model")
    quantize_folder(str(made / "model"), made / "grace", "w4g32", method="rtn", scale="minmax")
    return made


def test_every_layout_answers_alike(folder: Path) -> None:
    expected = LLM(str(folder / "grace"), "cpu").generate(TEXTS, sampling=PARAMS)
    assert len({answer.token_ids for answer in expected}) > 1
    for name in converters():
        if name != "grace":
            pack(folder / "grace", folder / name, name)
        loaded, quantized = open_model(str(folder / name), "cpu")
        assert quantized.keys() == open_model(str(folder / "grace"), "cpu")[1].keys()
        for module, tensor in quantized.items():
            weight = loaded.model.get_submodule(module).weight
            assert torch.equal(
                weight, (tensor.codes * tensor.scale.float().repeat_interleave(32, 1)).bfloat16().float()
            )
        assert LLM(str(folder / name), "cpu").generate(TEXTS, sampling=PARAMS) == expected, name


def test_what_is_no_model_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; expected a model folder"):
        open_model(str(tmp_path / "nowhere"))
    pack(folder / "grace", tmp_path / "awq", "awq")
    shard = next((tmp_path / "awq").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(FormatError):
        open_model(str(tmp_path / "awq"))
