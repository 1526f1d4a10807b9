"""A layer is swapped in alone: unquantized ones do nothing, and what the sums say is what a plain forward says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from toy_run import write_models, write_rows

from grace_vlm.errors import ConfigError
from grace_vlm.evals.why.damage import Damage, swapped, weight_error
from grace_vlm.evals.why.rows import Sampled, SampledRows
from grace_vlm.evals.why.states import Watched
from grace_vlm.models.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, SampledRows]:
    folder = tmp_path_factory.mktemp("damage")
    rows = write_rows(folder)
    write_models(folder)
    model = load_model(str(folder / "student"), "cpu")
    return model, SampledRows(model, Sampled(rows, num_rows=9))


def with_noise(loaded: LoadedModel, layers: tuple[int, ...]) -> LoadedModel:
    """A copy, some of whose layers are off by a tenth."""
    model = copy.deepcopy(loaded.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            for parameter in model.model.language_model.layers[layer].parameters():
                parameter.add_(0.1 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return LoadedModel(model, loaded.processor, loaded.adapter, loaded.path)


def damage_of(before: LoadedModel, other: LoadedModel, rows: SampledRows, linears: bool = False) -> dict:  # type: ignore[type-arg]
    own, its = Watched(before, "before"), Watched(other, "student")
    damage = Damage(own, its, linears)
    for batch in rows.batches():
        vision = own.vision(batch)
        base = own.states(batch, vision, layers=True)
        damage.add(batch, vision, base, its.states(batch, its.vision(batch)))
    return damage.summary()


def test_a_layer_that_is_the_same_does_nothing(loaded: tuple[LoadedModel, SampledRows]) -> None:
    model, rows = loaded
    found = damage_of(model, with_noise(model, (1,)), rows)
    same, noisy = found["layers"]
    assert (same["weight_error"], same["output_error"], same["kl"], same["flips"]) == (0.0, 0.0, 0.0, 0.0)
    assert noisy["weight_error"] == pytest.approx(0.1, rel=0.02)
    assert 0.01 < noisy["output_error"] < 1
    assert noisy["kl"] > 0
    assert found["whole"]["kl"] == pytest.approx(noisy["kl"], rel=1e-5), "the one layer is the whole difference"
    assert found["sum_of_layers"] == noisy["kl"]


def test_a_single_layer_is_what_a_model_with_it_says(loaded: tuple[LoadedModel, SampledRows]) -> None:
    """Both layers are off; the effect of the first is that of a model in which only the first is."""
    model, rows = loaded
    both = with_noise(model, (0, 1))
    found = damage_of(model, both, rows)
    alone = copy.deepcopy(model.model)
    alone.model.language_model.layers[0].load_state_dict(both.model.model.language_model.layers[0].state_dict())
    kl = tokens = 0.0
    for batch in rows.batches():
        log_probs = []
        for one in (model.model, alone):
            watched = Watched(LoadedModel(one, model.processor, model.adapter, model.path), "student")
            hidden = watched.states(batch, watched.vision(batch)).hidden
            log_probs.append(F.log_softmax(hidden @ watched.head.T, dim=-1))
        kl += float(F.kl_div(log_probs[1], log_probs[0], log_target=True, reduction="sum"))
        tokens += len(log_probs[0])
    assert found["num_tokens"] == tokens
    assert found["layers"][0]["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert found["layers"][1]["kl"] > 0


def rounded(loaded: LoadedModel, names: tuple[str, ...]) -> LoadedModel:
    """A copy with some linears on a coarse grid."""
    model = copy.deepcopy(loaded.model)
    for name in names:
        weight = model.model.language_model.get_submodule(name).weight
        weight.data = (weight.data / weight.std() * 2).round() * weight.std() / 2
    return LoadedModel(model, loaded.processor, loaded.adapter, loaded.path)


def test_a_single_linear_is_what_a_model_with_it_says(loaded: tuple[LoadedModel, SampledRows]) -> None:
    """Two linears are off: each alone has the effect of a model in which it is the only one, the others have none."""
    model, rows = loaded
    off = ("layers.0.self_attn.v_proj", "layers.1.mlp.down_proj")
    found = damage_of(model, rounded(model, off), rows, linears=True)["linears"]
    assert len(found) == 14
    effects = {f"layers.{one['layer']}.{one['linear']}": one for one in found}
    for name, one in effects.items():
        if name in off:
            alone = damage_of(model, rounded(model, (name,)), rows)["whole"]
            assert one["kl"] == pytest.approx(alone["kl"], rel=1e-5)
            assert one["flips"] == alone["flips"]
            assert 0.05 < one["weight_error"] < 0.5
        else:
            assert (one["kl"], one["flips"], one["weight_error"]) == (0.0, 0.0, 0.0)
    assert damage_of(model, rounded(model, off), rows)["linears"] is None


def test_a_linear_beside_other_norms_is_left_out(loaded: tuple[LoadedModel, SampledRows]) -> None:
    model, _ = loaded
    other = rounded(model, ("layers.0.mlp.up_proj",))
    assert not Damage(Watched(model, "before"), Watched(other, "student"), linears=True).linears_left_out
    other.model.model.language_model.layers[1].input_layernorm.weight.data.mul_(2)
    damage = Damage(Watched(model, "before"), Watched(other, "student"), linears=True)
    assert damage.linears_left_out
    assert damage.summary()["linears"] is None


def test_what_was_swapped_is_put_back(loaded: tuple[LoadedModel, SampledRows]) -> None:
    model, _ = loaded
    layer, other = (m.model.model.language_model.layers[0] for m in (model, with_noise(model, (0,))))
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    def fail() -> None:
        with swapped(layer, other):
            assert not torch.equal(layer.self_attn.q_proj.weight, before["self_attn.q_proj.weight"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_weight_error_is_over_all_linears() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for part in (layer[0], layer[2]):
            part.weight.fill_(1.0)  # type: ignore[operator, union-attr]
        other[0].weight.fill_(1.5)  # type: ignore[operator, union-attr]
        other[2].weight.fill_(1.0)  # type: ignore[operator, union-attr]
    assert weight_error(layer, other) == pytest.approx(math.sqrt(16 * 0.25 / 24))


def test_models_of_other_sizes_are_refused(loaded: tuple[LoadedModel, SampledRows]) -> None:
    model, _ = loaded
    layers = model.model.model.language_model.layers
    with (
        pytest.raises(
            ConfigError, match="layers of different parameters; give the unquantized model of the same sizes"
        ),
        swapped(layers[0], torch.nn.Linear(3, 3)),
    ):
        pass
    shorter = copy.deepcopy(model.model)
    del shorter.model.language_model.layers[1]
    other = LoadedModel(shorter, model.processor, model.adapter, model.path)
    with pytest.raises(ConfigError, match="--before has 1 decoder layers and the model 2; give the unquantized model"):
        Damage(Watched(other, "before"), Watched(model, "student"))
