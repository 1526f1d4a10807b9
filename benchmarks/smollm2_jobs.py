"""What rows the SmolLM2 comparison has: methods, variants and rates, each as overrides of one recipe.

All trained rows have the same data, order of rows per seed and number of steps (``recipes/smollm2/comparison.yaml``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm2_rows import key_of, read_rows, validation_score

RUNS, RECIPES = Path("runs/smollm2"), Path("recipes/smollm2")

SCHEME = "w4g64"

METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("method=sft", "scheme=bf16", "model.teacher=null"),
    "qat": ("method=qat", "model.teacher=null"),
    "kd": ("method=kd",),
    "grace": (),
    "grace_no_gate": ("loss.gate=false",),
    "grace_no_decoupled": ("loss.decoupled=false",),
    "grace_no_relational": ("loss.relational=false",),
    "grace_no_adaptive": ("loss.adaptive=false",),
}

ABLATIONS = tuple(name for name in METHODS if name.startswith("grace_no_"))

ROUNDED: dict[str, tuple[Any, Any]] = {
    "rtn_minmax": ("rtn", "minmax"),
    "rtn": ("rtn", "mse"),
    "awq": ("awq", "minmax"),
    "gptq": ("gptq", "minmax"),
    "block": ("block", "mse"),
}
"""Rows without training: method and scale rule. AWQ and GPTQ are published with min-max scales; of block
reconstruction scales are trained, from our own start."""

OTHER_RULES: dict[str, tuple[Any, Any]] = {
    "awq_mse": ("awq", "mse"),
    "gptq_mse": ("gptq", "mse"),
    "rtn_signed": ("rtn", "mse_signed"),
    "awq_signed": ("awq", "mse_signed"),
    "gptq_signed": ("gptq", "mse_signed"),
    "block_signed": ("block", "mse_signed"),
}
"""The same with other scale rules of ours."""

QUANTIZED_FIRST: dict[str, tuple[Any, Any]] = {
    "from_blocks": ("block", "mse"),
    "from_signed_blocks": ("block", "mse_signed"),
    "from_awq": ("awq", "mse"),
    "from_signed_awq": ("awq", "mse_signed"),
}
"""Variants that go on from the student as ``grace quantize --for-training`` leaves it: its method and scale rule."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "kd_global_t1": ("method=kd", "loss.temperature=1"),
    "microbatch": ("loss.normalization=microbatch", "data.micro_batch_size=PART", "data.accumulation=PARTS"),
    "temperature_1": ("loss.temperature=1",),
    "temperature_4": ("loss.temperature=4",),
    "even_parts": ("loss.nckd_weight=1",),
    "target_1": ("loss.adaptive_weight.target=1",),
    "relation_in_the_middle": ("loss.relational_layer=-8",),
    "relation_early": ("loss.relational_layer=4",),
    "gate_of_margin": ("loss.gate_signal=margin",),
    "gate_cold": ("loss.gate_temperature=0.25",),
    "five_bit_scales": ("quant.scale_rounding=sig5",),
    "head_w8": ("quant.head=w8g64",),
    "lsq_gradient": ("quant.scale_gradient=lsq",),
    "signed_scales": ("quant.scale_init=mse_signed",),
    "minmax_start": ("quant.scale_init=minmax",),
    "frozen_scales": ("optim.scale_learning_rate=0",),
    "twice_as_long": ("optim.num_steps=DOUBLE",),
    "seen_twice": ("optim.num_steps=DOUBLE", "data.train=SEEN", "data.root=ROOT"),
    "from_w8": ("model.student=FIRST",),
    **dict.fromkeys(QUANTIZED_FIRST, ("model.student=FIRST", "quant.scale_init=stored")),
    "self_first": ("model.student=FIRST",),
}

TWO_STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "from_w8": ("w8g64", ()),
    "self_first": ("bf16", ("model.teacher=STUDENT",)),
}
"""Variants that go on from a run of their own: its scheme, and what it changes."""

PICTURED = ("grace_no_relational", "relation_in_the_middle", "relation_early")
"""Rows that differ from GRACE in nothing without pictures."""

SEARCHED = ("qat", "kd", "grace")

MOST_PARTS = 4
"""Micro-batches that ``microbatch`` makes of one: with a single one it would be GRACE itself."""

SEEN_FILE = "rows.jsonl"
"""Of ``seen_twice``: as many rows as a run has room for, drawn by its seed; it reads them twice."""

OWN_RATE = ("from_signed_awq",)
"""Variants that may have a rate of their own: where they begin a large one loses more than it finds."""

RATES = (2e-5, 5e-5, 1e-4, 2e-4)

LANGUAGE_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
"""Of ``--language``, whose runs have a tenth of the steps."""

SCALE_RATE = 20
"""Of the scales to that of the weights, as published (2e-4 and 1e-5)."""


@dataclass(frozen=True)
class Job:
    """One row."""

    name: str
    scheme: str = SCHEME
    seed: int | None = None
    rate: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.scheme, self.seed, self.rate

    @property
    def label(self) -> str:
        """The key as a file's name."""
        return "_".join(map(str, self.key))


def recipe_of(job: Job, overrides: Sequence[str]) -> Any:
    """The comparison's recipe as a trained row has it."""
    from grace_vlm.train.config import load_recipe

    changes = METHODS.get(job.name) or VARIANTS.get(job.name, ())
    base = load_recipe(RECIPES / "comparison.yaml", overrides)
    parts = min(MOST_PARTS, base.data.micro_batch_size)
    words = {
        "DOUBLE": str(2 * base.optim.num_steps),
        "FIRST": str(first_stage(job)),
        "SEEN": str(first_stage(job) / SEEN_FILE),
        "ROOT": str(base.data.images_root),
        "PARTS": str(parts * base.data.accumulation),
        "PART": str(base.data.micro_batch_size // parts),
    }
    stated = [change.partition("=") for change in changes]
    return load_recipe(
        RECIPES / "comparison.yaml",
        [
            f"scheme={job.scheme}",
            f"runtime.seed={job.seed}",
            f"optim.learning_rate={job.rate}",
            f"optim.scale_learning_rate={SCALE_RATE * (job.rate or 0)}",
            *overrides,
            *(f"{key}={words.get(value, value)}" for key, _, value in stated),
        ],
    )


def first_stage(job: Job) -> Path:
    """What a variant of two stages goes on from, of this row alone: another of the same seed may be made meanwhile."""
    return RUNS / "first" / job.label


def search_jobs(rates: Sequence[float] = RATES) -> list[Job]:
    return [Job(name, SCHEME, 100, rate) for name in (*SEARCHED, *OWN_RATE) for rate in rates]


def best_rates(rows: Sequence[dict[str, Any]], rates: Sequence[float] = RATES) -> dict[str, float]:
    """Of each searched method the rate with the best validation score; its search must be complete, or later rows
    would have another rate than earlier ones. (A variant that was not searched at all has the rate of GRACE.)"""
    best: dict[str, tuple[float, float]] = {}
    wanted = {job.key: job for job in search_jobs(rates)}
    rows = [row for row in rows if key_of(row) in wanted]
    found = {key_of(row) for row in rows}
    begun = {*SEARCHED, *(row["name"] for row in rows)}
    if left := [key for key in wanted if key not in found and wanted[key].name in begun]:
        names = ", ".join(sorted({wanted[key].name for key in left}))
        search = "search --language" if rates == LANGUAGE_RATES else "search"
        sys.exit(f"{len(left)} rows of the search are missing ({names}); run: python benchmarks/smollm2.py {search}")
    for row in rows:
        score = validation_score(row)
        if row["name"] not in best or score > best[row["name"]][0]:
            best[row["name"]] = (score, row["rate"])
    return {name: rate for name, (_, rate) in best.items()}


def searched_rates(path: Path, student: str | None, rates: Sequence[float] = RATES) -> dict[str, float]:
    """``best_rates`` of the rows that a search for this student left in ``path``; None: for whichever it was."""
    return best_rates([row for row in read_rows(path) if student in (None, row["student"])], rates)


def trained(name: str, scheme: str, seeds: Sequence[int], rates: dict[str, float]) -> list[Job]:
    """A method's rows. What was not searched has the rate of GRACE, and fine-tuning alone that of QAT, whose loss it
    has."""
    if name == "sft":
        return [Job(name, "bf16", seed, rates["qat"]) for seed in seeds]
    return [Job(name, scheme, seed, rates.get(name, rates["grace"])) for seed in seeds]


def headline_jobs(rates: dict[str, float]) -> list[Job]:
    """Everyone's first seed before anyone's second."""
    jobs = [Job("teacher", "bf16"), Job("student", "bf16"), *(Job(name) for name in ROUNDED)]
    return jobs + [job for seed in range(5) for name in SEARCHED for job in trained(name, SCHEME, [seed], rates)]


def cost_jobs(rates: dict[str, float]) -> list[Job]:
    """The headline's methods, two seeds of the trained ones: the first of a process waits for what is compiled."""
    jobs = [Job(name) for name in ROUNDED]
    return jobs + [job for seed in range(2) for name in SEARCHED for job in trained(name, SCHEME, [seed], rates)]


def other_jobs(rates: dict[str, float]) -> list[Job]:
    jobs = [Job(name) for name in OTHER_RULES]
    jobs += [Job(name, scheme) for scheme in ("w8g64", "w3g64", "w4g32") for name in (*ROUNDED, *OTHER_RULES)]
    for seed in range(3):
        for scheme in ("w3g64", "w8g64", "w4g32"):
            jobs += [job for name in SEARCHED for job in trained(name, scheme, [seed], rates)]
        jobs += [job for name in ("sft", *ABLATIONS) for job in trained(name, SCHEME, [seed], rates)]
    return jobs


def variant_jobs(rates: dict[str, float]) -> list[Job]:
    return [job for seed in range(5) for name in VARIANTS for job in trained(name, SCHEME, [seed], rates)]


def small_jobs() -> list[Job]:
    """The language alone, all 30 layers: its teacher is the model itself before it was rounded."""
    jobs = [Job("student", "bf16"), *(Job(name) for name in (*ROUNDED, *OTHER_RULES))]
    return jobs + [Job(name, SCHEME, 0, RATES[1]) for name in SEARCHED]


ALONE = ("costs",)
"""Of ``JOBS``: whose rows share their GPU with nothing."""

JOBS: dict[str, Callable[[dict[str, float]], list[Job]]] = {
    "headline": headline_jobs,
    "others": other_jobs,
    "variants": variant_jobs,
    "costs": cost_jobs,
}
