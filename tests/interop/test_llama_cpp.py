"""GGUF folders in llama.cpp (the ``xllamacpp`` wheel): the next token, with and without pictures, beside Transformers'.

llama.cpp multiplies Q4_0 and Q8_0 by activations that it rounds to 8 bits, so its log-probabilities are not
Transformers'; what is its own share is seen on a BF16 file of the same baked weights. Asked are the trained toy student
(Qwen3-VL, easy-vqa's questions), whose answers are sure, and each family with random weights, whose answers often are
not: there the first token must be the same wherever the first two are further apart than rounding moves them.
llama.cpp resamples LLaVA's pictures even at the size that the tower takes, so those are of one colour.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import REPOSITORY, environment, format_tests, module_of, record, run_script
from PIL import Image
from questions import as_vector, easy_vqa_rows, inputs_of, random_rows, read_questions, write_questions
from smollm2_folder import write_smollm2

from grace_vlm.evals.suite.responders import data_url
from grace_vlm.formats.gguf_template import MARKER
from grace_vlm.formats.lazy import Lazy
from grace_vlm.formats.pack import pack
from grace_vlm.formats.registry import converter_for, read_model
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.registry import adapter_for

SCRIPT = Path(__file__).with_name("ask_llama_cpp.py")
FORM = Path(__file__).with_name("ask_llama_cpp_form.py")
FAMILIES = ("Qwen3-VL", "Qwen2-VL", "LLaVA-1.5")
SCHEMES = ("w4g128", "w8g128")
MARGIN = 0.3
"""Nats between the first two tokens that make the first one sure."""
LARGEST = {"Qwen3-VL": (0.15, 0.075), "Qwen2-VL": (0.15, 0.075), "LLaVA-1.5": (0.25, 0.2)}
"""Nats, of Q4_0 and Q8_0, and of BF16."""

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from environment(tmp_path_factory.mktemp("llama"), "GRACE_INTEROP_LLAMA_PYTHON", ["xllamacpp==2026.10.11549"])


def write_bf16(folder: Path, target: Path) -> Path:
    """The baked weights of a model folder as GGUF without a grid: llama.cpp's own arithmetic."""
    content = read_model(folder)
    baked = {f"{name}.weight": name for name in content.linears}
    weights = Lazy([*content.dense, *baked], lambda n: content.baked[baked[n]] if n in baked else content.dense[n])
    target.mkdir()
    plain = dataclasses.replace(content, linears={}, quantized={}, baked={}, dense=weights, bf16_names=())
    converter_for("gguf").write(plain, target)
    return target


def answers(python: Path, folder: Path, questions: Path) -> list[dict[str, Any]]:
    out = folder.with_suffix(".json")
    run_script(python, SCRIPT, folder, questions, out)
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def ids_in_llama_cpp(ours: torch.Tensor, pieces: list[list[int]], image: int) -> torch.Tensor:
    """LLaVA's ``input_ids`` (1, N) with llama.cpp's text around our picture: Llama's words get a space after one."""
    before = int((ours[0] == image).nonzero()[0])
    pictures = ours[0, ours[0] == image].tolist()
    assert ours[0, :before].tolist() == pieces[0]
    assert ours[0, before + len(pictures) :].tolist() in (pieces[1], pieces[1][1:])
    return torch.tensor([pieces[0] + pictures + pieces[1]])


@torch.inference_mode()
def expected(folder: Path, questions: Path, heard: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Stock Transformers' log-probabilities on the baked weights, FP32, for the very tokens that llama.cpp saw."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for question, answer in zip(read_questions(questions), heard, strict=True):
        inputs = inputs_of(processor, question)
        if model.config.model_type == "llava" and question["pictures"]:
            image = model.config.image_token_id
            inputs["input_ids"] = ids_in_llama_cpp(inputs["input_ids"], answer["pieces"], image)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert inputs["input_ids"].shape[1] == answer["num_tokens"]
        if not question["pictures"]:
            assert inputs["input_ids"][0].tolist() == answer["pieces"][0]
        found.append(model(**inputs).logits[0, -1].log_softmax(-1))
    return found


def compare(python: Path, folder: Path, questions: Path) -> dict[str, Any]:
    """{"gguf" or "bf16": figures} of a model folder with a grid."""
    packed, plain = pack(folder, folder.with_name(f"{folder.name}-gguf"), "gguf"), folder.with_name(f"{folder.name}-bf")
    heard_of = {
        "gguf": answers(python, packed, questions),
        "bf16": answers(python, write_bf16(folder, plain), questions),
    }
    wanted = torch.stack(expected(folder, questions, heard_of["gguf"]))
    report: dict[str, Any] = {}
    for kind, heard in heard_of.items():
        assert [answer["pieces"] for answer in heard] == [answer["pieces"] for answer in heard_of["gguf"]]
        got = torch.stack([as_vector(answer["logprobs"], wanted.shape[1]) for answer in heard])
        first = wanted.topk(2).values
        sure = (first[:, 0] - first[:, 1]) > MARGIN
        same = got.argmax(1) == wanted.argmax(1)
        likely = wanted > wanted.amax(1, keepdim=True) - 10  # what is less likely than e^-10 of the first says nothing
        report[kind] = {
            "prompts": len(heard),
            "with_picture": sum(bool(q["pictures"]) for q in read_questions(questions)),
            "top1_equal": int(same.sum()),
            "sure": int(sure.sum()),
            "top1_equal_of_sure": int((same & sure).sum()),
            "logprob_difference_max": round((got - wanted).abs()[likely].max().item(), 4),
            "logprob_difference_mean": round((got - wanted).abs()[likely].mean().item(), 5),
        }
    return report


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_family_with_random_weights(python: Path, tmp_path: Path, family: str, scheme: str) -> None:
    from transformers import AutoConfig, AutoProcessor

    torch.manual_seed(1)  # of six, the one under which most of LLaVA's first tokens are sure
    folder = format_tests("family_models").write_family(tmp_path / "model", family, scheme)
    vocab_size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    rows = random_rows(family, tmp_path, 180)
    questions = write_questions(tmp_path / "q.json", AutoProcessor.from_pretrained(folder), vocab_size, rows)
    report = compare(python, folder, questions)
    record(f"llama_cpp-{family}-{scheme}", report)
    for (kind, figures), largest in zip(report.items(), LARGEST[family], strict=True):
        assert figures["with_picture"] == 120
        assert figures["top1_equal_of_sure"] == figures["sure"] >= 50, kind
        assert figures["logprob_difference_max"] < largest, kind


def write_student(folder: Path, scheme: str) -> tuple[Path, Any, int]:
    """The trained toy student on a grid, its processor, and the size of its vocabulary."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from grace_vlm.formats.publish import publish_model
    from grace_vlm.ptq.rtn import round_to_nearest

    source = REPOSITORY / "assets" / "toy-student"
    processor = AutoProcessor.from_pretrained(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    plan = plan_model(model, adapter_for(model.config.model_type), scheme)
    quantized = round_to_nearest(model, plan, "mse_signed" if scheme == "w4g128" else "minmax")
    publish_model(folder, model, processor, quantized, plan.bf16_names, "the toy student\n")
    return folder, processor, model.config.get_text_config().vocab_size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_trained_student(python: Path, tmp_path: Path, scheme: str) -> None:
    folder, processor, vocab_size = write_student(tmp_path / "model", scheme)
    questions = write_questions(tmp_path / "q.json", processor, vocab_size, easy_vqa_rows(tmp_path, 100))
    report = compare(python, folder, questions)
    record(f"llama_cpp-trained-{scheme}", report)
    for kind, figures in report.items():
        assert figures["with_picture"] == figures["top1_equal"] == 100, kind


def test_whole_answers_in_its_chat_form(python: Path, tmp_path: Path) -> None:
    """``benchmarks/smollm2_runtimes.py``: llama.cpp's own template and pictures, asked as a server is."""
    folder, _, _ = write_student(tmp_path / "model", "w4g128")
    rows = [
        {
            "id": str(number),
            "image": picture.name,
            "category": "easy",
            "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "yes"}],
        }
        for number, (text, picture) in enumerate(easy_vqa_rows(tmp_path, 20))
        if picture is not None
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    runtimes = module_of("benchmarks", "smollm2_runtimes")
    runtimes.main([str(folder), f"--llama-python={python}", f"--data={data}", f"--out={tmp_path / 'out'}"])
    content = json.loads((tmp_path / "out" / "runtimes.json").read_text(encoding="utf-8"))
    same = [one["said"]["llama_cpp"] == one["said"]["engine"] != "" for one in content["answers"]]
    assert len(same) == 20
    assert sum(same) >= 19
    assert content["versions"] == {"llama_cpp": "2026.10.11549"}
    assert [path.name for path in (tmp_path / "out" / "chat").iterdir()] == ["easy.png"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_of_a_chat_about_a_picture(python: Path, tmp_path: Path, family: str) -> None:
    """What a template has behind a picture is behind llama.cpp's marker: LLaVA's line break; Qwen's has its own marks
    of a picture, which llama.cpp writes itself."""
    from transformers import AutoProcessor

    folder = format_tests("family_models").write_family(tmp_path / "model", family, "w4g128")
    packed = pack(folder, tmp_path / "packed", "gguf")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "teal").save(picture)
    text = {"type": "text", "text": "what color is it?"}
    shown = {"type": "image_url", "image_url": {"url": data_url(picture.read_bytes())}}
    request, out = tmp_path / "request.json", tmp_path / "prompt.json"
    request.write_text(json.dumps({"messages": [{"role": "user", "content": [shown, text]}]}), encoding="utf-8")
    run_script(python, FORM, packed, request, out)
    turn = {"role": "user", "content": [{"type": "image"}, text]}
    wanted = AutoProcessor.from_pretrained(folder).apply_chat_template([turn], add_generation_prompt=True)
    wanted = re.sub(r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<image>", MARKER, wanted)
    assert json.loads(out.read_text(encoding="utf-8")) == wanted
    assert (f"{MARKER}\n" in wanted) == (family == "LLaVA-1.5")


def test_smollm2(python: Path, tmp_path: Path) -> None:
    """Groups of 64, a tied head, digits cut one by one, real weights. The tower is random: what it shows is like
    nothing that the language model knows, so rounding is amplified; one tower layer off is 0.5 nats in the mean."""
    from transformers import AutoConfig, AutoProcessor

    folder = write_smollm2(tmp_path, "w4g64")
    vocab_size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    rows = random_rows("SmolLM2", tmp_path, 12)
    questions = write_questions(tmp_path / "q.json", AutoProcessor.from_pretrained(folder), vocab_size, rows)
    heard = answers(python, pack(folder, tmp_path / "packed", "gguf"), questions)
    means: dict[bool, list[float]] = {False: [], True: []}
    for said, wanted, (_, picture) in zip(heard, expected(folder, questions, heard), rows, strict=True):
        got = as_vector(said["logprobs"], len(wanted))
        likely = wanted > wanted.max() - 10
        means[picture is not None].append((got - wanted).abs()[likely].mean().item())
    record("llama_cpp-SmolLM2-w4g64", {"text": means[False], "picture": means[True]})
    assert (len(means[False]), len(means[True])) == (4, 8)
    assert max(means[False]) < 0.2
    assert max(means[True]) < 0.4
