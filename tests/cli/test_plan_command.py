"""``grace plan``, ``grace train --dry-run`` and ``--fit``: what is said before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_vlm.cli import main as cli
from grace_vlm.errors import GraceError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def grace(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process: (standard output, standard error); a user error as its line."""

    def run(*words: object) -> tuple[str, str]:
        try:
            cli.app([str(word) for word in words], standalone_mode=False)
        except GraceError as error:
            return "", str(error)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def document(found: tuple[str, str]) -> Any:
    assert found[0], found[1]
    return json.loads(found[0])


def test_the_published_student(grace: Any) -> None:
    plan = document(grace("plan", "Qwen/Qwen3-VL-2B-Instruct", "--json"))
    assert (plan["num_linears"], plan["num_scales"], plan["num_parameters"]) == (196, 11_010_048, 2_127_532_032)
    assert plan["bytes_by_part"]["language"]["bf16_bytes"] == 2 * 1_409_286_144
    assert plan["bytes_by_part"]["language"]["stored_bytes"] == 1_409_286_144 * 4.125 / 8
    assert plan["bf16_bytes"] == 2 * 2_127_532_032
    assert set(plan["formats"]) >= {"grace", "compressed-tensors", "awq", "gptq", "mlx", "official", "official-awq"}
    assert set(plan["formats"].values()) == {None}
    by_name = {entry["name"]: entry for entry in plan["linears"]}
    assert by_name["model.language_model.layers.27.mlp.down_proj"] == {
        "name": "model.language_model.layers.27.mlp.down_proj",
        "part": "language",
        "out_features": 2048,
        "in_features": 6144,
        "scheme": "w4g128",
        "num_scales": 2048 * 48,
        "bf16_bytes": 2 * 2048 * 6144,
        "stored_bytes": 2048 * 6144 * 4.125 / 8,
        "why_bf16": None,
    }
    assert by_name["model.visual.blocks.0.attn.qkv"]["why_bf16"] == (
        "the paper keeps the vision tower (quant.tower gives it a grid)"
    )


def test_the_table_has_a_line_a_kind_and_says_why(grace: Any) -> None:
    out = grace("plan", "llava-hf/llava-1.5-7b-hf")[0]
    line = next(line for line in out.splitlines() if line.startswith("model.language_model.layers.N.mlp.gate_proj"))
    assert line.split()[1:] == ["32", "11008", "x", "4096", "w4g128", "2,885,681,152", "743,964,672"]
    assert "bf16: lm_head, model.language_model.embed_tokens" in out.replace(
        "bf16: model.language_model.embed_tokens, lm_head", "bf16: lm_head, model.language_model.embed_tokens"
    )
    assert "224 linears on a grid, 50,593,792 scales, 3.13x smaller once packed" in out
    every = grace("plan", "llava-hf/llava-1.5-7b-hf", "--all")[0]
    assert "model.language_model.layers.31.mlp.gate_proj" in every


def test_a_mix_is_said_by_the_formats(grace: Any) -> None:
    head = document(grace("plan", "Qwen/Qwen3-VL-2B-Instruct", "--head", "w8g128", "--tower", "w8g128", "--json"))
    assert head["num_linears"] == 196 + 24 * 4 + 1
    expected = {
        "grace": None,
        "compressed-tensors": "model.language_model.embed_tokens is an embedding with a grid; compressed-tensors packs "
        "linears: leave quant.head in bf16",
        "official": "the official layout holds one scheme for the whole model; this one has w4g128, w8g128",
        "awq": "awq holds one scheme for the whole model; this one has w4g128, w8g128",
    }
    assert expected.items() <= head["formats"].items()
    tower = document(grace("plan", "Qwen/Qwen3-VL-2B-Instruct", "--tower", "w8g128", "--json"))
    assert tower["formats"]["compressed-tensors"] is None
    down = document(grace("plan", "Qwen/Qwen3-VL-2B-Instruct", "--override", ".*up_proj=w8g128", "--json"))
    assert "vLLM fuses gate_proj, up_proj: give them one scheme" in down["formats"]["compressed-tensors"]


def test_errors_of_plan_are_one_line(grace: Any) -> None:
    assert grace("plan", "nowhere/at/all")[1] == (
        "nowhere/at/all does not exist; expected a model folder, a run folder or a hub id like org/name"
    )
    assert grace("plan", "Qwen/Qwen3-VL-2B-Instruct", "--override", "w8g128")[1] == (
        "--override 'w8g128' is not PATTERN=SCHEME, for example '.*down_proj=w8g128'"
    )
    assert grace("plan", "Qwen/Qwen3-VL-2B-Instruct", "--scheme", "int4")[1] == (
        "unknown scheme 'int4'; expected bf16 or w{8,4,3,2}g{N}, for example w4g128"
    )


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.yaml")) if "toy" not in path.stem])
def test_every_published_recipe_says_what_it_costs(grace: Any, name: str) -> None:
    found = document(grace("train", RECIPES / f"{name}.yaml", "--dry-run", "--json", "--gpu", "a100"))
    assert found["rows_per_step"] in (512, 256)
    picture = {"qwen3": 196, "qwen2": 256, "llava": 576}[name[:5]]
    assert found["load"]["visual_tokens"] == picture
    assert found["tokens_per_step"] == found["rows_per_step"] * (picture + 316)
    assert found["peak_bytes"] == sum(found["memory_bytes"].values())
    assert set(found["memory_bytes"]) == {
        "student weights",
        "masters",
        "gradients",
        "moments",
        "scales",
        "activations",
        "graphs",
        "loss",
        "teacher weights",
        "teacher signals",
    }
    assert found["flop_per_step"] == pytest.approx(sum(found["flop_by_part"].values()))
    assert found["hours"] > 1
    assert found["rows"] is None


def test_the_dry_run_in_words(grace: Any, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"id": 1}\n' * 10)
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    shape = ("--row-tokens", "400", "--visual-tokens", "100", "--supervised-share", "0.52")
    out = grace("train", recipe, f"data.train={rows}", "--dry-run", *shape)[0]
    assert "196 linears on a grid" in out
    assert "a step: 512 rows, 204,800 tokens on one process" in out
    assert "assumed rows: 400 tokens, 100 of them visual, 52% supervised" in out
    assert f"data: 10 rows in {rows}; the run takes 665,088, 66508.80 epochs" in out
    assert grace("train", recipe, "--dry-run", "--gpu", "tpu")[1].startswith(
        "--gpu 'tpu' is unknown; expected one of h100"
    )
    assert grace("train", recipe, "--dry-run", "--row-tokens", "10")[1].startswith("rows of 10 tokens, 196 visual")
    assert grace("train", recipe)[1] == "--out is missing; give the run folder to make, for example --out runs/first"


def test_fit_changes_the_least_and_refuses_what_cannot_be(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    whole = grace("train", recipe, "--dry-run", "--fit", "80GB", "--json")
    assert "  the recipe as it is" in whole[1]
    small = grace("train", recipe, "--dry-run", "--fit", "48GB", "--json")
    assert "  model.teacher_precision=fp8: " in small[1]
    assert document(small)["peak_bytes"] + (2 << 30) <= 48 << 30 < document(whole)["peak_bytes"]
    assert document(small)["rows_per_step"] == 512
    assert "  optim.moments=8bit: " not in small[1]
    smaller = grace("train", recipe, "--dry-run", "--fit", "40GB", "--json")
    assert "  model.teacher_precision=fp8: " in smaller[1]
    assert "  optim.moments=8bit: " in smaller[1]
    moments = [document(found)["memory_bytes"]["moments"] for found in (small, smaller)]
    assert moments[1] / moments[0] == pytest.approx(2.03125 / 8)
    refused = grace("train", recipe, "--dry-run", "--fit", "24GB")[1]
    assert refused.startswith("no set-up of this recipe fits 24 GiB: the smallest needs 34.")
    assert refused.endswith(
        "use a larger GPU, smaller models or a cached teacher (model.teacher_cache, docs/training.md)"
    )
    assert grace("train", recipe, "--dry-run", "--fit", "big")[1] == (
        "--fit 'big' is no size of a GPU; expected for example 24GB, 40GB, 48GB or 80GB"
    )
    # Without checkpointing more is kept: the lever is pulled only when it must be.
    roomy = grace("train", recipe, "--dry-run", "--fit", "80GB", "--json", "runtime.gradient_checkpointing=false")
    assert "  the recipe as it is" in roomy[1]
    tight = grace("train", recipe, "--dry-run", "--fit", "52GB", "--json", "runtime.gradient_checkpointing=false")
    assert "  runtime.gradient_checkpointing=true: " in tight[1]


def test_an_overridden_student_is_the_one_that_is_described(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    for student, size in (
        ("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("runs/never/there", 2_127_532_032),
    ):
        found = document(grace("train", recipe, f"model.student={student}", "--dry-run", "--json"))
        assert found["plan"]["num_parameters"] == size
    short = document(grace("train", recipe, "model.student=random:Qwen/Qwen3-VL-8B-Instruct:4", "--dry-run", "--json"))
    assert short["plan"]["num_linears"] == 28
    plan = document(grace("train", recipe, "--plan", "--json"))
    assert len(plan["linears"]) == 196


def test_what_cannot_be_is_said_in_a_line(grace: Any, tmp_path: Path) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    zero = grace("train", recipe, "--dry-run", "--row-tokens", "0", "--visual-tokens", "0")[1]
    assert zero.startswith("rows of 0 tokens, 0 visual, share 1 supervised cannot be; expected")
    (tmp_path / "empty.jsonl").write_text("")
    out = grace("train", recipe, f"data.train={tmp_path}/empty.jsonl", "--dry-run")[0]
    assert out.endswith(f"data: {tmp_path}/empty.jsonl holds no rows\n")
    assert grace("train", recipe, "--dry-run", "loss.relational_layer=-1")[1] == (
        "loss.relational_layer is -1 and the decoder has 28 layers; expected the input of one: 0 to 27, or -29 to -2"
    )


def test_the_estimate_counts_what_the_recipe_asks_for(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"

    def cost(*overrides: str) -> Any:
        return document(grace("train", recipe, "--dry-run", "--json", *overrides))

    plain = cost()
    cached = cost("data.workers=0", "data.pixel_cache_gib=2", "runtime.tower_cache_gib=3")
    assert cached["memory_bytes"]["caches"] == (2 + 3 + 3) << 30
    assert cached["peak_bytes"] == plain["peak_bytes"] + (8 << 30)
    # A limit on tokens that the rows cannot reach changes nothing.
    assert cost("data.max_batch_tokens=8192")["peak_bytes"] == plain["peak_bytes"]
    assert cost("data.max_batch_tokens=8192", "data.micro_batch_size=64")["tokens_per_step"] == 8192 * 256
    trained = cost("model.train=all", "runtime.cuda_graphs=false")
    assert trained["memory_bytes"]["activations"] > plain["memory_bytes"]["activations"]
    assert trained["flop_by_part"]["student tower"] == 4 * plain["flop_by_part"]["student tower"]
    assert grace("train", recipe, "--dry-run", "model.train=all")[1] == (
        "runtime.cuda_graphs with model.train=all: this tower adds to layers of the decoder (DeepStack, 3), whose "
        "graphs make no gradient for it; set model.train=default or runtime.cuda_graphs=false"
    )


def test_a_teacher_on_a_gpu_of_its_own_is_counted_there(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    found = {
        device: document(grace("train", recipe, "--dry-run", "--json", f"model.teacher_device={device}"))
        for device in ("null", "cuda:0", "cuda:1")
    }
    assert found["null"] == found["cuda:0"]
    beside, alone = found["cuda:1"], found["null"]
    assert "teacher_memory_bytes" not in alone
    weights = alone["memory_bytes"]["teacher weights"]
    assert beside["teacher_memory_bytes"]["teacher weights"] == weights
    head = 2 * 151_936 * 4096
    assert beside["memory_bytes"]["teacher head"] == head
    assert beside["peak_bytes"] == alone["peak_bytes"] - weights + head
    assert beside["flop_per_step"] == alone["flop_per_step"]
    assert beside["seconds_per_step"] < alone["seconds_per_step"]
    text = grace("train", recipe, "--dry-run", "model.teacher_device=cuda:1")[0]
    assert "memory of cuda:1" in text
    assert " hours on two h100" in text
    # Both GPUs must fit: it is the teacher's that an 8 GB card is too small for.
    tiny = ("optim.moments=8bit", "model.student=random:Qwen/Qwen3-VL-2B-Instruct:1", "data.micro_batch_size=1")
    refused = grace("train", recipe, "--dry-run", "--fit", "8GB", "model.teacher_device=cuda:1", *tiny)[1]
    assert refused.startswith("no set-up of this recipe fits 8 GiB: the smallest needs ")
    assert "(teacher weights " in refused
    without = grace("train", recipe, "--dry-run", "--json", "model.teacher_device=cuda:1", "method=qat")
    assert "teacher_memory_bytes" not in document(without)
    # What frees nothing where memory is short is not changed: FP8 for a student that is too large, and the reverse.
    said = grace("train", recipe, "--dry-run", "--fit", "32GB", "--json", "model.teacher_device=cuda:1")[1]
    assert "optim.moments=8bit" in said
    assert "teacher_precision" not in said
    assert "micro_batch_size" not in said
    said = grace("train", recipe, "--dry-run", "--fit", "18GB", "--json", "model.teacher_device=cuda:1", *tiny)[1]
    assert "teacher_precision=fp8" in said
    assert "loss_workspace" not in said


def test_devices_are_read_where_the_recipe_is(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    for override in ("model.teacher_device=banana", "model.teacher_device=auto", "runtime.device=gpu"):
        said = grace("train", recipe, "--dry-run", override)[1]
        assert said.startswith(f"{override.split('=')[0]} on the command line is ")
        assert "should match pattern" in said
    same = ("runtime.device=cuda:0", "model.teacher_device=cuda")
    assert "teacher_memory_bytes" not in document(grace("train", recipe, "--dry-run", "--json", *same))
    other = ("runtime.device=cuda:1", "model.teacher_device=cuda")
    assert "memory of cuda:0" in grace("train", recipe, "--dry-run", *other)[0]
    kept = ("model.teacher_device=cuda:1", "data.pixel_cache_gib=1", "data.workers=0")
    assert grace("train", recipe, "--dry-run", *kept)[1].startswith(
        "data.pixel_cache_gib keeps pixels on the student's"
    )
    plain, graphs = (
        document(grace("train", recipe, "--dry-run", "--json", f"runtime.cuda_graphs={on}"))["memory_bytes"]
        for on in ("false", "true")
    )
    assert "graphs" not in plain
    assert graphs["graphs"] > plain["activations"]


def test_fit_cuts_only_what_stays_the_same(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    plain = "runtime.cuda_graphs=false"
    large = (plain, "data.micro_batch_size=6", "data.accumulation=80", "--dry-run", "--fit", "51GB", "--json")
    assert "data.micro_batch_size=2 data.accumulation=240" in grace("train", recipe, *large)[1]
    for override in (["loss.normalization=microbatch"], ["data.packing=false", "data.group_by_length=true"]):
        found = grace("train", recipe, *override, *large)
        assert "data.micro_batch_size" not in found[1]
        assert "runtime.loss_workspace_mib=128: " in found[1]
    packs = ("data.max_batch_tokens=32768", "data.micro_batch_size=999", "data.accumulation=4", "data.max_tokens=4096")
    found = grace("train", recipe, plain, *packs, "--dry-run", "--json", "--fit", "53GB")[1]
    assert "data.max_batch_tokens=8192 data.accumulation=16: smaller packs, about the same rows a step" in found


def test_fit_gives_up_graphs_before_what_is_learned(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    packs = ("data.max_batch_tokens=8192", "data.micro_batch_size=999", "data.accumulation=8")
    cost = {
        graphs: document(grace("train", recipe, *packs, f"runtime.cuda_graphs={graphs}", "--dry-run", "--json"))
        for graphs in ("true", "false")
    }
    small = {"runtime.loss_workspace_mib=128", "--dry-run", "--json"}
    between = (cost["true"]["peak_bytes"] + cost["false"]["peak_bytes"]) // 2 // 2**30 + 2
    found = grace("train", recipe, *packs, *small, "--fit", f"{between}GiB")[1]
    assert "runtime.cuda_graphs=false: layers kernel by kernel, at the pace of the host" in found
    assert "moments" not in found


def test_the_estimate_of_several_processes_counts_what_they_share_out(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"

    def memory(*words: str) -> Any:
        plain = ("--dry-run", "--json", "runtime.cuda_graphs=false", "data.accumulation=32")
        return document(grace("train", recipe, *plain, *words))

    one, eight = memory(), memory("--processes", "8")
    assert (one["num_processes"], eight["num_processes"]) == (1, 8)
    assert eight["rows_per_step"] * 8 == one["rows_per_step"]
    assert eight["flop_per_step"] * 8 == pytest.approx(one["flop_per_step"])
    of_one = one["memory_bytes"]
    found = {
        sharding: memory("--processes", "8", f"runtime.sharding={sharding}")["memory_bytes"]
        for sharding in ("optimizer", "gradients", "parameters")
    }
    layers = 28 * (2 * 2048 * 2048 + 2 * 1024 * 2048 + 3 * 6144 * 2048)
    for parts in found.values():
        assert parts["masters"] == of_one["masters"] // 8
        assert parts["moments"] == of_one["moments"] // 8
        assert parts["teacher signals"] == of_one["teacher signals"] // 8
    assert found["optimizer"] == eight["memory_bytes"]
    assert found["optimizer"]["gradients"] == of_one["gradients"]
    for sharding in ("gradients", "parameters"):
        assert found[sharding]["gradients"] == of_one["gradients"] - 4 * layers * 7 // 8
    assert found["gradients"]["student weights"] == of_one["student weights"]
    assert found["parameters"]["student weights"] == of_one["student weights"] - 2 * layers * 7 // 8
    assert found["gradients"]["exchange"] == 6 * layers // 28
    assert found["parameters"]["exchange"] == (6 + 4) * layers // 28
    shared = memory("--processes", "8", "model.teacher_sharding=parameters")["memory_bytes"]
    theirs = 36 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12288 * 4096)
    assert shared["teacher weights"] == of_one["teacher weights"] - 2 * theirs * 7 // 8
    # A language model that is not trained is whole everywhere, and has no gradients.
    vision = ("--processes", "8", "model.train=vision", "scheme=bf16")
    alone = memory("model.train=vision", "scheme=bf16")["memory_bytes"]
    for sharding in ("gradients", "parameters"):
        parts = memory(*vision, f"runtime.sharding={sharding}")["memory_bytes"]
        assert parts["gradients"] == alone["gradients"]
        assert parts["student weights"] == alone["student weights"]
    assert grace("train", recipe, "--dry-run", "--processes", "7")[1].startswith("data.accumulation is 256 micro-")
    text = grace("train", recipe, "--dry-run", "--processes", "8")[0]
    assert "memory of each of 8 GPUs" in text
    assert " hours on 8 h100, without what they exchange" in text


def test_fit_shares_layers_out_before_what_is_learned_changes(grace: Any) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    found = grace("train", recipe, "--dry-run", "--json", "--fit", "24GB", "--processes", "4")
    for said in ("runtime.cuda_graphs=false: ", "runtime.sharding=parameters: ", "model.teacher_sharding=parameters: "):
        assert f"  {said}" in found[1]
    assert "fp8" not in found[1]
    assert "8bit" not in found[1]
    assert document(found)["peak_bytes"] + (2 << 30) <= 24 << 30
    codes = grace("train", recipe, "--dry-run", "--fit", "24GB", "--processes", "4", "runtime.gather=codes")
    assert "come and go in every pass (runtime.gather=weights with it)" in codes[1]
    # What the launcher or a card asks for and graphs would record is refused before anything is opened.
    refused = grace("train", recipe, "--dry-run", "runtime.sharding=gradients")[1]
    assert refused == (
        "runtime.sharding=gradients exchanges between layers, which runtime.cuda_graphs would record; "
        "set runtime.cuda_graphs=false (runtime.compile stays)"
    )


def test_the_launcher_has_its_say_in_an_estimate(grace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES / "qwen3_vl_2b_grace_w4g128.yaml"
    ask = ("train", recipe, "--dry-run", "--json", "--processes", "4", "runtime.cuda_graphs=false")
    expected = document(grace(*ask, "runtime.sharding=parameters"))["memory_bytes"]
    plain = document(grace(*ask))["memory_bytes"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert document(grace(*ask))["memory_bytes"] == expected != plain
    assert "the recipe has runtime.sharding=gradients; leave one" in grace(*ask, "runtime.sharding=gradients")[1]
    # A launcher of ZeRO-1 would refuse a run that shares more out.
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    fitting = grace("train", recipe, "--dry-run", "--fit", "24GB", "--processes", "4", "runtime.cuda_graphs=false")
    assert "runtime.sharding" not in fitting[1]
    assert "model.teacher_sharding=parameters" in fitting[1]
