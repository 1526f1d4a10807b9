"""The adapter of docs/extending.md, installed as a stranger's package: trained, published and packed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import recipe_tree, write_rows

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def install(folder: Path) -> Path:
    """The module and the entry point, as pip would lay them out."""
    toml, module = blocks("extending.md", "toml")[0], blocks("extending.md", "python")[0]
    site = folder / "site"
    info = site / "grace_vipllava-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "grace_vipllava.py").write_text(module)
    group, name, value = re.search(r'entry-points\."(.+?)"\]\n(\w+) = "(.+?)"', toml).groups()  # type: ignore[union-attr]
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: grace-vipllava\nVersion: 0.1\n")
    return site


def write_model(folder: Path) -> None:
    """A small ViP-LLaVA with a real processor, as an ordinary folder."""
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    from grace_vlm.models.toy import build_toy_processor

    processor = build_toy_processor(["what color is the square?", "red", "green", "blue"] * 3, size="llava")
    tokenizer: Any = processor.tokenizer
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
              "num_attention_heads": 2, "image_size": 112, "patch_size": 14, "projection_dim": 16}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 640, "max_position_embeddings": 1024,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = VipLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-2, -3, 1],
        image_seq_length=64,
    )
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from grace_vlm.data.collate import collate
from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import patchify_of
from grace_vlm.data.rows import Row, Turn
from grace_vlm.formats.pack import pack
from grace_vlm.formats.verify import verify
from grace_vlm.models.load import load_model
from grace_vlm.models.registry import adapter_for
from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import train

folder, tree = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
loaded = load_model(str(folder / "model"), "cpu")
image = Image.open(folder / "images" / "0.png")
made = patchify_of(loaded.adapter, loaded.model.config, loaded.processor)([image])
turns = (Turn("user", "<image> what color is the square?"), Turn("assistant", "red"))
sample = Encoder(loaded.processor, loaded.adapter, loaded.model.config).encode(Row(0, "0", ("a",), turns), [made[0][0]])
batch = collate([sample], [], [], 0)
with torch.no_grad():
    vision = loaded.adapter.tower(loaded.model, [made[0][1]], [made[0][0]])
    ours = loaded.model.lm_head(loaded.adapter.decode(loaded.model, batch.input_ids, batch.position_ids, vision).last)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the square?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    text = loaded.processor.apply_chat_template(messages, tokenize=False)
    inputs = loaded.processor(text=[text], images=[image], return_tensors="pt")
    stock = loaded.model(**inputs).logits
final = train(recipe_from(tree, "test"), folder / "run")
packed = pack(final, folder / "packed", "compressed-tensors")
opened = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.bfloat16)
print(json.dumps({
    "adapter": type(adapter_for("vipllava")).__module__,
    "same_ids": inputs["input_ids"].tolist() == batch.input_ids.tolist(),
    "difference": float((ours - stock).abs().max() / stock.abs().max()),
    "equal": verify(final, packed).equal,
    "linears": len(json.loads((final / "grid" / "plan.json").read_text())["linears"]),
    "class": type(opened).__name__,
}))
"""


def test_a_strangers_adapter_works_without_touching_a_file_of_ours(tmp_path: Path) -> None:
    site = install(tmp_path)
    write_rows(tmp_path / "rows", 24)
    (tmp_path / "rows" / "images").rename(tmp_path / "images")
    (tmp_path / "rows" / "rows.jsonl").rename(tmp_path / "rows.jsonl")
    write_model(tmp_path / "model")
    tree = recipe_tree(tmp_path, runtime__checkpoint_every_steps=0, runtime__tower_cache_gib=0, optim__num_steps=2)
    tree["model"] = {"student": str(tmp_path / "model"), "teacher": str(tmp_path / "model")}
    tree["data"]["packing"] = True
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(tree)],
        capture_output=True, text=True, check=False, env={**__import__("os").environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    facts = json.loads(found.stdout.splitlines()[-1])
    assert facts.pop("difference") < 2e-5
    assert facts == {
        "adapter": "grace_vipllava",
        "same_ids": True,
        "equal": True,
        "linears": 14,
        "class": "VipLlavaForConditionalGeneration",
    }


def test_without_the_package_the_model_type_is_unknown() -> None:
    from grace_vlm.errors import ConfigError
    from grace_vlm.models.registry import adapter_for

    with pytest.raises(ConfigError, match="model type 'vipllava' has no adapter"):
        adapter_for("vipllava")
