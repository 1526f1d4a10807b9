"""Recipes: what is read, what is refused, and the words of each refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grace_vlm.errors import ConfigError
from grace_vlm.train.config import Recipe, dump_recipe, load_recipe, recipe_from

BASE: dict[str, Any] = {
    "method": "grace",
    "scheme": "w4g128",
    "model": {"student": "s", "teacher": "t"},
    "data": {"train": "d.json"},
    "optim": {"num_steps": 10},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(BASE))
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_published_defaults(path: Path) -> None:
    recipe = load_recipe(path)
    loss, optim = recipe.loss, recipe.optim
    assert (loss.temperature, loss.tckd_weight, loss.nckd_weight, loss.relational_weight) == (2.0, 1.0, 4.0, 3.0)
    assert (loss.relational_layer, loss.relational_warmup_steps, loss.distillation_warmup_steps) == (-2, 400, 0)
    adaptive = loss.adaptive_weight
    assert (adaptive.target, adaptive.step_size, adaptive.ema_decay) == (3.0, 0.003, 0.99)
    assert (adaptive.initial, adaptive.minimum, adaptive.maximum) == (0.5, 0.1, 1.0)
    assert (optim.learning_rate, optim.scale_learning_rate, optim.weight_decay) == (1e-5, 2e-4, 1e-3)
    assert (optim.warmup_fraction, optim.max_grad_norm) == (0.03, 1.0)
    assert recipe.quant.clip_mask == "official"
    assert recipe.quant.scale_gradient == "none"
    assert recipe.quant.scale_rounding == "bf16"
    assert loss.normalization == "global"


def test_overrides_have_yamls_types(path: Path) -> None:
    recipe = load_recipe(
        path,
        [
            "optim.learning_rate=1e-4",
            "optim.num_steps=7",
            "loss.gate=false",
            "loss.adaptive_weight.target=2",
            "quant.overrides={.*down_proj: w8g128}",
            "model.teacher=runs/a=b",
            "runtime.trackers=[tensorboard]",
            "method=kd",
        ],
    )
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.optim.num_steps == 7
    assert recipe.loss.gate is False
    assert recipe.loss.adaptive_weight.target == 2.0
    assert recipe.quant.overrides == {".*down_proj": "w8g128"}
    assert recipe.model.teacher == "runs/a=b"
    assert recipe.runtime.trackers == ("tensorboard",)
    assert recipe.method == "kd"


def test_the_last_override_wins_and_the_file_is_left_alone(path: Path) -> None:
    before = path.read_text()
    assert load_recipe(path, ["optim.num_steps=7", "optim.num_steps=8"]).optim.num_steps == 8
    assert path.read_text() == before


def test_unknown_keys(path: Path) -> None:
    at, end = "on the command line;", "see docs/recipes.md for the keys there are"
    guess = "did you mean optim.learning_rate?"
    assert refusal(path, "optim.learning_rat=1") == f"unknown key optim.learning_rat {at} {guess} {end}"
    assert refusal(path, "speed=1") == f"unknown key speed {at} {end}"
    assert refusal(path, "loss.adaptive_weight.tau=1") == f"unknown key loss.adaptive_weight.tau {at} {end}"
    path.write_text(path.read_text() + "sceme: w4g128\n")
    assert refusal(path) == f"unknown key sceme in {path}; did you mean scheme? {end}"


@pytest.mark.parametrize(
    "key", ["method", "scheme", "model", "data", "optim", "model.student", "data.train", "optim.num_steps"]
)
def test_missing_keys(tmp_path: Path, key: str) -> None:
    tree = yaml.safe_load(yaml.safe_dump(BASE))
    *parents, last = key.split(".")
    section = tree
    for parent in parents:
        section = section[parent]
    del section[last]
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert refusal(file) == f"{file} lacks the key {key}; add it or pass {key}=VALUE"


@pytest.mark.parametrize("override", ["optim.num_steps", "=3", "", "num_steps 3"])
def test_overrides_that_are_none(path: Path, override: str) -> None:
    assert refusal(path, override) == f"override {override!r} is not key=value, for example optim.num_steps=100"


def test_an_override_through_a_value(path: Path) -> None:
    assert refusal(path, "method.gate=1") == "override method.gate: method is a value, not a section"
    assert refusal(path, "optim.num_steps.x=1") == "override optim.num_steps.x: num_steps is a value, not a section"


def test_an_override_that_is_no_yaml(path: Path) -> None:
    assert refusal(path, "model.student=[a") == "override value '[a' is not YAML"


def test_values_that_do_not_fit_name_the_key_and_the_value(path: Path) -> None:
    where = "on the command line is"
    assert refusal(path, "optim.num_steps=0") == (
        f"optim.num_steps {where} 0: input should be greater than or equal to 1"
    )
    assert refusal(path, "optim.num_steps=many").startswith(
        f"optim.num_steps {where} 'many': input should be a valid integer"
    )
    assert refusal(path, "loss.temperature=0") == f"loss.temperature {where} 0: input should be greater than 0"
    assert refusal(path, "method=magic") == f"method {where} 'magic': input should be 'sft', 'qat', 'kd' or 'grace'"
    assert refusal(path, "quant.clip_mask=none").startswith(f"quant.clip_mask {where} 'none': ")
    assert refusal(path, "loss.min_tokens=1").endswith("is 1: input should be greater than or equal to 2")
    path.write_text(path.read_text() + "runtime: {seed: many}\n")
    assert refusal(path).startswith(f"runtime.seed in {path} is 'many': input should be a valid integer")


@pytest.mark.parametrize("scheme", ["w4g128", "w2g64"])
def test_sft_excludes_a_grid(path: Path, scheme: str) -> None:
    assert refusal(path, "method=sft", f"scheme={scheme}") == (
        f"method sft trains in bf16, scheme is {scheme}; use method=qat or scheme=bf16"
    )


def test_qat_needs_a_grid(path: Path) -> None:
    assert refusal(path, "method=qat", "scheme=bf16") == (
        "method qat needs a grid, scheme is bf16; use scheme=w4g128 or method=sft"
    )


@pytest.mark.parametrize("method", ["kd", "grace"])
def test_distillation_needs_a_teacher(path: Path, method: str) -> None:
    assert refusal(path, f"method={method}", "model.teacher=null") == (
        f"method {method} needs a teacher; set model.teacher to a model folder"
    )


def test_an_unknown_scheme(path: Path) -> None:
    assert refusal(path, "scheme=int4") == (
        "unknown scheme 'int4'; expected bf16 or w{8,4,3,2}g{N}, for example w4g128"
    )


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("sft", "bf16"), ("qat", "w3g64"), ("kd", "bf16"), ("kd", "w8g128"), ("grace", "bf16"), ("grace", "w2g128")],
)
def test_what_goes_together(path: Path, method: str, scheme: str) -> None:
    recipe = load_recipe(path, [f"method={method}", f"scheme={scheme}"])
    assert (recipe.method, recipe.scheme) == (method, scheme)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert refusal(missing) == f"recipe {missing} does not exist; see recipes/ for those that ship"
    listed, broken, binary = (tmp_path / name for name in ("list.yaml", "broken.yaml", "binary.yaml"))
    listed.write_text("- a\n- b\n")
    assert refusal(listed) == f"recipe {listed} is not a mapping of sections"
    listed.write_text("")
    assert refusal(listed) == f"recipe {listed} is not a mapping of sections"
    broken.write_text("model: {student: [\n")
    assert refusal(broken).startswith(f"recipe {broken} is not YAML: ")
    binary.write_bytes(b"\xff\xfe\x00model")
    assert refusal(binary) == f"recipe {binary} is not YAML: not UTF-8"
    assert refusal(tmp_path) == f"recipe {tmp_path} does not exist; see recipes/ for those that ship"


def test_a_dump_is_complete_and_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["optim.learning_rate=3e-4", "runtime.trackers=[wandb]", "quant.overrides={a: bf16}"])
    text = dump_recipe(recipe)
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_recipe(again) == recipe
    assert dump_recipe(load_recipe(again)) == text
    tree = yaml.safe_load(text)
    assert set(tree) == set(Recipe.model_fields)
    assert tree["loss"]["adaptive_weight"]["ema_decay"] == 0.99


def test_the_objective_has_what_the_recipe_says(path: Path) -> None:
    overrides = ["loss.gate=false", "loss.temperature=4", "loss.relational_weight=1", "loss.min_tokens=9"]
    overrides += ["loss.tckd_weight=2", "loss.nckd_weight=8", "loss.decoupled=false", "loss.vocabulary=common"]
    objective = load_recipe(path, overrides).objective()
    assert (objective.method, objective.gate, objective.decoupled, objective.relational) == (
        "grace",
        False,
        False,
        True,
    )
    assert (objective.temperature, objective.tckd_weight, objective.nckd_weight) == (4.0, 2.0, 8.0)
    assert (objective.relational_weight, objective.min_tokens, objective.vocabulary) == (1.0, 9, "common")


def test_every_field_says_what_it_is() -> None:
    def sections(model: Any) -> list[Any]:
        nested = [f.annotation for f in model.model_fields.values() if hasattr(f.annotation, "model_fields")]
        return [model, *(s for child in nested for s in sections(child))]

    for section in sections(Recipe):
        for name, field in section.model_fields.items():
            assert field.description or hasattr(field.annotation, "model_fields"), f"{section.__name__}.{name}"


def test_a_recipe_cannot_be_changed() -> None:
    recipe = recipe_from(BASE, "here")
    with pytest.raises(ValueError, match="frozen"):
        recipe.method = "sft"  # type: ignore[misc]


def test_shipped_recipes_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        recipe = load_recipe(file)
        assert f"_{recipe.method}_" in f"_{file.stem}_", f"{file.name} is named model_method_scheme"
        assert file.stem.endswith(recipe.scheme), file.name


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.teacher_cache=cache",), "model.teacher_cache: a cached teacher has no layers"),
        (("model.teacher_device=cuda:1",), "model.teacher_device: a GPU of its own holds it whole"),
        (
            ("data.packing=true", "runtime.cuda_graphs=true"),
            "runtime.cuda_graphs: layers that come and go are not recorded",
        ),
    ],
)
def test_a_sharded_teacher_refuses_what_cannot_go_with_it(path: Path, overrides: tuple[str, ...], said: str) -> None:
    sharded = "model.teacher_sharding=parameters"
    assert refusal(path, sharded, *overrides) == f"{sharded} and {said}; set one of them only"
    # A method without a teacher has nothing to say about one.
    assert load_recipe(path, [sharded, "method=qat", *overrides]).model.teacher_sharding == "parameters"


def test_layers_that_exchange_are_not_recorded(path: Path) -> None:
    graphs = ("data.packing=true", "runtime.cuda_graphs=true")
    assert refusal(path, "runtime.sharding=parameters", *graphs) == (
        "runtime.sharding=parameters exchanges between layers, which runtime.cuda_graphs would record; "
        "set runtime.cuda_graphs=false (runtime.compile stays)"
    )
    assert load_recipe(path, ["runtime.sharding=optimizer", *graphs]).runtime.cuda_graphs


def test_codes_are_gathered_once_a_step_only(path: Path) -> None:
    assert refusal(path, "runtime.gather=codes", "runtime.sharding=parameters") == (
        "runtime.gather=codes is for weights that are gathered once a step, and runtime.sharding=parameters gathers "
        "them in every pass; set one of them only"
    )
    assert load_recipe(path, ["runtime.gather=codes", "runtime.sharding=gradients"]).runtime.gather == "codes"
