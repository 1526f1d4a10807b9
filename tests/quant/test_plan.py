"""The plan: every linear listed, nothing silent, the last match wins."""

from __future__ import annotations

import json

import pytest

from grace_vlm.errors import ConfigError
from grace_vlm.quant.plan import make_plan
from grace_vlm.quant.scheme import QuantScheme

LINEARS = {
    "visual.blocks.0.mlp": (64, 100),
    "layers.0.q_proj": (256, 128),
    "layers.0.down_proj": (128, 384),
    "layers.1.q_proj": (256, 128),
    "layers.1.down_proj": (128, 384),
    "lm_head": (1024, 128),
}
QUANTIZABLE = r"layers\.\d+\.(q|down)_proj"


def schemes(plan: object) -> dict[str, str]:
    return {entry.name: entry.scheme.name if entry.scheme else "bf16" for entry in plan.entries}  # type: ignore[attr-defined]


def test_every_linear_is_listed_in_order() -> None:
    plan = make_plan(LINEARS, QUANTIZABLE, "w4g128")
    assert schemes(plan) == {
        "visual.blocks.0.mlp": "bf16",
        "layers.0.q_proj": "w4g128",
        "layers.0.down_proj": "w4g128",
        "layers.1.q_proj": "w4g128",
        "layers.1.down_proj": "w4g128",
        "lm_head": "bf16",
    }
    assert list(plan.schemes) == [name for name in LINEARS if name.startswith("layers")]
    assert plan.bf16_names == ("visual.blocks.0.mlp", "lm_head")
    assert [(e.out_features, e.in_features) for e in plan.entries] == list(LINEARS.values())


def test_overrides_apply_in_order_and_the_last_match_wins() -> None:
    overrides = [(r"layers\.0\..*", "w8g128"), (r".*down_proj", "w4g64"), (r"layers\.1\.down_proj", "bf16")]
    plan = make_plan(LINEARS, QUANTIZABLE, "w4g128", overrides, "sig5")
    assert schemes(plan) == {
        "visual.blocks.0.mlp": "bf16",
        "layers.0.q_proj": "w8g128",
        "layers.0.down_proj": "w4g64",
        "layers.1.q_proj": "w4g128",
        "layers.1.down_proj": "bf16",
        "lm_head": "bf16",
    }
    assert {scheme.scale_rounding for scheme in plan.schemes.values()} == {"sig5"}
    reversed_plan = make_plan(LINEARS, QUANTIZABLE, "w4g128", overrides[::-1])
    assert schemes(reversed_plan)["layers.0.down_proj"] == "w8g128"
    # An override may reach a linear that the scheme leaves alone.
    assert schemes(make_plan(LINEARS, QUANTIZABLE, "w4g128", [("lm_head", "w8g128")]))["lm_head"] == "w8g128"


@pytest.mark.parametrize("as_override", [False, True])
def test_a_pattern_that_matches_nothing_is_an_error(as_override: bool) -> None:
    # A part of a name is no match.
    quantizable, overrides = (QUANTIZABLE, [("q_proj", "w8g128")]) if as_override else ("q_proj", [])
    with pytest.raises(ConfigError) as caught:
        make_plan(LINEARS, quantizable, "w4g128", overrides)
    assert str(caught.value) == (
        "pattern 'q_proj' matches none of the 6 linears; names look like 'visual.blocks.0.mlp' (see grace inspect)"
    )


def test_a_pattern_that_is_no_expression_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(LINEARS, "layers.(", "w4g128")
    assert str(caught.value).startswith("pattern 'layers.(' is no regular expression: ")


def test_a_group_size_that_does_not_divide_names_the_linear() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(LINEARS, ".*", "w4g128")
    assert str(caught.value) == (
        "group size 128 does not divide in_features 100 of visual.blocks.0.mlp; keep this layer in bf16"
    )


def test_an_unknown_scheme_is_an_error_even_in_an_override() -> None:
    with pytest.raises(ConfigError, match="unknown scheme 'int4'"):
        make_plan(LINEARS, QUANTIZABLE, "w4g128", [("lm_head", "int4")])


def test_json_is_what_plan_json_holds() -> None:
    plan = make_plan(LINEARS, r"layers\.0\.q_proj", "w4g128", [("lm_head", "w8g64")])
    document = {
        "format_version": 1,
        "linears": [
            {
                "name": "layers.0.q_proj",
                "scheme": "w4g128",
                "scale_rounding": "bf16",
                "out_features": 256,
                "in_features": 128,
            },
            {"name": "lm_head", "scheme": "w8g64", "scale_rounding": "bf16", "out_features": 1024, "in_features": 128},
        ],
        "bf16": ["visual.blocks.0.mlp", "layers.0.down_proj", "layers.1.q_proj", "layers.1.down_proj"],
    }
    assert plan.to_json() == document
    assert json.loads(json.dumps(plan.to_json())) == document


def test_bytes_count_codes_and_scales() -> None:
    plan = make_plan(LINEARS, r"layers\.0\.q_proj", "w4g128")
    q_proj, head = plan.entries[1], plan.entries[5]
    assert q_proj.scheme == QuantScheme(4, 128)
    assert q_proj.bf16_bytes == 2 * 256 * 128
    assert q_proj.stored_bytes == 256 * 128 / 2 + 256 * 2
    assert head.stored_bytes == head.bf16_bytes == 2 * 1024 * 128
    assert plan.table()[1] == ("layers.0.q_proj", "256 x 128", "w4g128", "65,536", "16,896")
    assert plan.table()[5][2] == "bf16"


def test_bf16_plans_nothing() -> None:
    assert make_plan(LINEARS, QUANTIZABLE, "bf16").schemes == {}
