"""Pictures say the numbers; a name cannot become markup."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from grace_vlm.evals.why.page import write_pictures
from grace_vlm.evals.why.pictures import pictures_of
from grace_vlm.evals.why.summary import summary_lines

BINS = [{"mean": 0.1 * i, "num_wrong": 10 * i, "num": 100, "low": 0.08 * i, "high": 0.12 * i} for i in range(1, 5)]
PART = {
    "num_tokens": 400,
    "num_rows": 90,
    "error_rate": 0.25,
    "pearson": {"r": 0.5, "low": 0.4, "high": 0.6},
    **{
        kind: {"bins": BINS, "line": {"slope": 1.0, "intercept": 0.0, "r_squared": 0.901}}
        for kind in ("equal_widths", "equal_counts")
    },
}
CKA = {
    "num_pictures": 3,
    "matrix": [[0.5, None], [0.6, 0.7]],
    "matched": [{"student": 0, "teacher": 0, "cka": 0.5}, {"student": 1, "teacher": 1, "cka": 0.7}],
    "tapped": 0.5,
}
LAYER = {"weight_error": 0.1, "output_error": 0.2, "kl": 1e-3, "flips": 0.01}
RESULT: dict[str, Any] = {
    "models": {"model": "<script>alert(1)</script>", "teacher": "t", "before": None},
    "data": {"path": "rows.jsonl", "num_rows": 90, "seed": 0},
    "dtype": "float32",
    "hardware": "2 cores",
    "left_out": ["Something is <b>left out</b>."],
    "entropy": {"all": PART, "first": PART},
    "gate": {"edges": [0.4, 0.7, 1.0], "counts": [0, 9], "mean": 0.9, "mean_right": 0.95, "mean_wrong": 0.8},
    "cka": CKA,
    "cka_before": None,
    "layers": {
        "layers": [{"layer": n, **LAYER} for n in range(3)],
        "whole": {"kl": 2e-3, "flips": 0.02},
        "sum_of_layers": 3e-3,
        "linears": [
            {"layer": n, "linear": f"self_attn.{k}_proj", "weight_error": 0.1, "kl": kl, "flips": 0.0}
            for n, kl in enumerate((1e-3, 0.0, 2e-2))
            for k in "qv"
        ],
    },
    "codes": {
        "schemes": {"w2g64": {"first_code": -2, "counts": [1, 2, 3, 2], "bits_used": 1.9, "share_at_ends": 0.375}},
        "linears": {},
    },
}


def titles(text: str) -> str:
    """Every hover text of a picture, which must be well-formed."""
    root = ElementTree.fromstring(text)
    return "\n".join(node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}title"))


def test_pictures_say_their_numbers() -> None:
    found = pictures_of(RESULT)
    assert list(found) == [
        "entropy.svg", "entropy_counts.svg", "gate.svg", "cka.svg", "cka_states.svg", "layers.svg", "effect.svg",
        "linears.svg", "codes_w2g64.svg",
    ]  # fmt: skip
    assert "20 of 100 wrong at mean 0.2 nats" in titles(found["entropy.svg"])
    assert "R² 0.901" in found["entropy.svg"]
    assert "9 of gate 0.700 to 1.000" in titles(found["gate.svg"])
    assert "student 1, teacher 0: 0.600" in titles(found["cka_states.svg"])
    assert "student 0, teacher 1" not in titles(found["cka_states.svg"])
    assert "output error, layer 2: 0.2" in titles(found["layers.svg"])
    assert "layer 2, self_attn.v_proj: KL 0.02 nats" in titles(found["linears.svg"])
    assert "layer 1" not in titles(found["linears.svg"])
    assert ">-1.7<" in found["linears.svg"]
    assert "3 times 0" in titles(found["codes_w2g64.svg"])
    assert found == pictures_of(copy.deepcopy(RESULT))


def test_what_has_no_numbers_has_no_picture() -> None:
    nothing = {**RESULT, "entropy": None, "gate": None, "cka": None, "layers": None, "codes": None}
    assert pictures_of(nothing) == {}
    assert summary_lines(nothing) == []
    empty = copy.deepcopy(RESULT)
    empty["cka"] = {"num_pictures": 0, "matrix": [], "matched": [], "tapped": None}
    empty["layers"]["layers"] = [{"layer": 0, **dict.fromkeys(LAYER, 0.0)}]
    empty["layers"]["linears"] = [{"layer": 0, "linear": "q", **dict.fromkeys(LAYER, 0.0)}]
    empty["gate"]["counts"] = [0, 0]
    assert set(pictures_of(empty)) == {"entropy.svg", "entropy_counts.svg", "codes_w2g64.svg"}


def test_the_page_holds_every_picture_and_no_markup_of_strangers(tmp_path: Path) -> None:
    written = write_pictures(tmp_path, RESULT)
    assert written[-1] == tmp_path / "index.html"
    page = written[-1].read_text()
    assert page.count("<figure>") == len(written) - 1 == 9
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;left out" in page
    assert '<data value="0.901">0.901</data>' in page


def test_the_summary() -> None:
    lines = dict(summary_lines(RESULT))
    assert lines["  Pearson r of entropy and error"] == "0.500 [0.400, 0.600]"
    assert lines["  R² over 4 bins of equal widths"] == "0.901"
    assert lines["layer 1: output error, KL"] == "0.2000, 1.00e-03 nats"
    assert lines["self_attn.q_proj alone, sum of layers"] == "2.10e-02 nats, most in layer 2: 2.00e-02"
    assert lines["w2g64: bits used of its codes"] == "1.900, 37.50 % at the ends"
