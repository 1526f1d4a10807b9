"""What the rows of the SmolLM2 comparison say, in sentences: every number is read off the records.

``report_smollm2.py`` writes them above the tables. Orders are computed, too; what a reader may conclude stands on the
page, without numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smollm2_jobs import ABLATIONS, OTHER_RULES, ROUNDED, SCHEME, SEARCHED, VARIANTS
from smollm2_pairs import Tested, pairs_of, pairs_with_grace, shown_p, tested
from smollm2_rows import read_object, read_rows, validation_score
from smollm2_runs import LABELS, Runs, collect, least_seconds, recovered, scheme_of, values
from smollm2_units import Measure, divergence, test_right, text_loss

NAMES = {
    "rtn_minmax": "rounding",
    "rtn": "rounding with MSE scales",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "block": "block reconstruction",
    "qat": "QAT",
    "kd": "plain distillation",
    "grace": "GRACE",
}
COMPARED = (*(name for name in ROUNDED if name != "rtn_minmax"), *SEARCHED)
"""With rounding by min-max scales."""


class Said:
    """Numbers of one folder's runs as words; a method's are those at ``SCHEME`` where no width is named."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._tested: dict[tuple[str, str], Tested] = {}

    def mean(self, name: str, measure: Measure, scheme: str = SCHEME) -> float:
        return statistics.mean(values(self.runs, (name, scheme_of(name, scheme)), measure))

    def right(self, name: str, scheme: str = SCHEME) -> str:
        return f"{self.mean(name, test_right, scheme):.1f}"

    def perplexity(self, name: str, scheme: str = SCHEME) -> str:
        found = values(self.runs, (name, scheme_of(name, scheme)), text_loss)
        mean = statistics.mean(map(math.exp, found))
        return f"{mean:.0f}" if mean >= 100 else f"{mean:.1f}"

    def kl(self, name: str) -> str:
        return f"{self.mean(name, divergence):.3f}"

    def both(self, name: str) -> str:
        return f"{self.perplexity(name)} (KL {self.kl(name)})"

    def share(self, name: str, measure: Measure) -> str:
        """Of the loss by rounding, what is given back."""
        return recovered(self.runs, name, SCHEME, measure)

    def ordered(self, names: Iterable[str], measure: Measure, scheme: str = SCHEME, sign: int = -1) -> list[str]:
        """Those that are there, best first (``sign`` 1: where less is better)."""
        there = [name for name in names if (name, scheme_of(name, scheme)) in self.runs]
        return sorted(there, key=lambda name: sign * self.mean(name, measure, scheme))

    def listed(self, names: Iterable[str], shown: Callable[[str], str]) -> str:
        return ", ".join(f"{NAMES[name]} {shown(name)}" for name in names)

    def at(self, label: str, measure: str) -> Tested | None:
        """The line of a pair in the table that has it."""
        if not self._tested:
            tables = (pairs_of(SCHEME), pairs_with_grace(ABLATIONS), pairs_with_grace(tuple(VARIANTS)))
            lines = [line for pairs in tables for line in tested(self.runs, pairs)]
            self._tested = {(line.label, line.measure): line for line in lines}
        return self._tested.get((label, measure))

    def gap(self, label: str, measure: str, unit: str = "") -> str:
        """A difference with its p, and p adjusted for all of its table."""
        one = self.at(label, measure)
        if one is None:
            return "not measured"
        digits = 1 if measure.endswith("%") else 3
        shown = _signed(one.mean, digits) + unit
        if math.isnan(one.p):
            return f"{shown} (one seed)" if len(one.seeds) == 1 else shown
        return f"{shown} (p {shown_p(one.p)}, Holm {shown_p(one.adjusted)})"


def _signed(number: float, digits: int = 1) -> str:
    """With its sign, if anything is left of it."""
    shown = f"{number:+.{digits}f}"
    return shown if float(shown) else shown[1:]


def _words(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def pair_said(folder: Path, runs: Runs, costs: Runs) -> list[str]:
    """Of student and teacher with pictures; ``folder`` has what was searched."""
    needed = {("student", "bf16"), ("teacher", "bf16"), *((name, SCHEME) for name in ("rtn_minmax", *SEARCHED))}
    if not needed <= runs.keys():
        return []
    s = Said(runs)
    lost = s.mean("student", test_right) - s.mean("rtn_minmax", test_right)
    more = 100 * math.expm1(s.mean("rtn_minmax", text_loss) - s.mean("student", text_loss))
    asked = sum(bit != "-" for bit in runs["student", "bf16"][None]["questions"]["correct"])
    trained = s.ordered(SEARCHED, test_right)
    lines = [
        f"- **Four bits hurt.** Rounding with min-max scales costs {more:.0f} % of perplexity "
        f"({s.perplexity('student')} to {s.perplexity('rtn_minmax')}) and {lost:.1f} points of the questions "
        f"({s.right('student')} to {s.right('rtn_minmax')} % of {asked:,} that no rate was chosen on).",
        f"- **The teacher is better**, so there is something to be taught: {s.right('teacher')} % of the questions, "
        f"{s.gap('teacher, BF16 - student, BF16', 'questions %', ' points')}, and a perplexity of "
        f"{s.perplexity('teacher')}.",
        "- **Of the lost points** give back, best first: "
        + s.listed(s.ordered(COMPARED, test_right), lambda name: s.share(name, test_right))
        + f". Of what was trained the order is {_words([NAMES[name] for name in trained])}: GRACE - QAT "
        f"{s.gap('GRACE - QAT', 'questions %')}, GRACE - plain distillation "
        f"{s.gap('GRACE - QAT with plain distillation', 'questions %')}, GRACE - block reconstruction "
        f"{s.gap('GRACE - block reconstruction', 'questions %')}, plain distillation - QAT "
        f"{s.gap('QAT with plain distillation - QAT', 'questions %')}.",
        f"- **On the toy suite** GRACE - rounding is {s.gap('GRACE - RTN, min-max scales', 'toy suite %')}, "
        f"GRACE - QAT {s.gap('GRACE - QAT', 'toy suite %')}, GRACE - plain distillation "
        f"{s.gap('GRACE - QAT with plain distillation', 'toy suite %')}.",
        "- **Of the lost log perplexity** give back: "
        + s.listed(s.ordered(COMPARED, text_loss, sign=1), lambda name: s.share(name, text_loss))
        + ". Of these, nearest to BF16 in KL: "
        + s.listed(s.ordered(COMPARED, divergence, sign=1), s.kl)
        + f"; GRACE - QAT {s.gap('GRACE - QAT', 'KL to BF16')}.",
        *_rates_said(folder, s),
        *_widths_said(s),
        *_parts_said(s),
        *_variants_said(s),
        *_costs_said(costs),
    ]
    return lines


def _rates_said(folder: Path, s: Said) -> list[str]:
    """Which rate was best, by how much, and what the two first seeds had at others."""
    student = next(iter(s.runs["student", "bf16"].values()))["student"]
    rows = [row for row in read_rows(folder / "search.jsonl") if row["student"] == student]
    said = []
    for name in SEARCHED:
        ordered = sorted((row for row in rows if row["name"] == name), key=validation_score, reverse=True)
        if len(ordered) > 1:
            first, second = ordered[:2]
            by = 100 * (validation_score(first) - validation_score(second))
            said.append(f"{NAMES[name]} {first['rate']:g} (by {by:.2f} points)")
    if not said:
        return []
    lines = [
        "- **Rates**, the best of four on the other half of the questions, one seed: "
        + ", ".join(said)
        + ". In the last step, a mean over seeds, GRACE's distillation term is "
        f"{_last(s.runs, 'grace', 'distillation'):.1f} "
        f"(b, T² and both parts in it; [method.md](method.md)) at a weight of {_last(s.runs, 'grace', 'weight'):g}, "
        f"its cross-entropy {_last(s.runs, 'grace', 'cross_entropy'):.2f}, where QAT's is "
        f"{_last(s.runs, 'qat', 'cross_entropy'):.2f} and plain distillation's "
        f"{_last(s.runs, 'kd', 'cross_entropy'):.2f}."
    ]
    others, own = collect([folder / "other_rates.jsonl"])
    if own and own[0]["student"] == student:
        pairs = {name: others.get((name, SCHEME), {}) for name in ("grace", "qat")}
        made = [*pairs.values(), *(s.runs[name, SCHEME] for name in pairs)]
        seeds = [seed for seed in made[0] if all(seed in rows for rows in made)]
        if not seeds:
            return lines
        gaps = [
            statistics.mean(_right(one["grace"][seed]) - _right(one["qat"][seed]) for seed in seeds)
            for one in (pairs, {name: s.runs[name, SCHEME] for name in pairs})
        ]
        rates = {name: next(iter(rows.values()))["rate"] for name, rows in pairs.items()}
        lines[0] += (
            f" GRACE at {rates['grace']:g} beside QAT at {rates['qat']:g}: {_signed(gaps[0])} points over the seeds "
            f"{_words([str(seed) for seed in seeds])}; at the searched rates these seeds have {_signed(gaps[1])}."
        )
    return lines


def _right(row: dict[str, Any]) -> float:
    found = test_right(row)
    assert found is not None
    return found


def _last(runs: Runs, name: str, what: str) -> float:
    """A mean over seeds of what the last step's record has."""
    return statistics.mean(row["last"][what] for row in runs[name, SCHEME].values())


def _widths_said(s: Said) -> list[str]:
    """A line a width."""
    lines = []
    for scheme, title in (("w3g64", "At three bits"), ("w8g64", "At eight bits"), ("w4g32", "In groups of 32")):
        names = s.ordered((*ROUNDED, *SEARCHED), test_right, scheme)
        if not set(SEARCHED) <= set(names):
            continue
        seeds = max(len(s.runs[name, scheme]) for name in SEARCHED)
        how = "one seed" if seeds == 1 else f"up to {seeds} seeds"
        lines.append(
            f"- **{title}** ({how}; the rates of four bits), % of the questions: "
            + s.listed(names, partial(s.right, scheme=scheme))
            + f"; the student {s.right('student')}. Perplexity: "
            + s.listed(s.ordered(names, text_loss, scheme, 1), partial(s.perplexity, scheme=scheme))
            + "."
        )
    return lines


def _parts_said(s: Said) -> list[str]:
    there = [LABELS[name] for name in ABLATIONS if (name, SCHEME) in s.runs]
    told = [f"{label.removeprefix('GRACE ')}: {_gaps(s, label)}" for label in there]
    return [f"- **GRACE** {'; '.join(told)}."] if told else []


def _gaps(s: Said, label: str) -> str:
    """How far from GRACE, in every measure that there is."""
    shown = {"questions %": "questions", "toy suite %": "suite", "log perplexity": "log perplexity", "KL to BF16": "KL"}
    return ", ".join(
        f"{short} {s.gap(f'{label} - GRACE', measure)}"
        for measure, short in shown.items()
        if s.at(f"{label} - GRACE", measure) is not None
    )


def _variants_said(s: Said) -> list[str]:
    """Variants that were made with every seed of GRACE."""
    there = [name for name in VARIANTS if len(s.runs.get((name, SCHEME), ())) == len(s.runs["grace", SCHEME])]
    parts = []
    for name in there:
        rate = next(iter(s.runs[name, SCHEME].values()))["rate"]
        count = len(s.runs[name, SCHEME])
        parts.append(f"- **`{name}` - GRACE** ({count} seeds, rate {rate:g}): {_gaps(s, f'`{name}`')}.")
    return parts


def _costs_said(costs: Runs) -> list[str]:
    names = [name for name in COMPARED if least_seconds(costs.get((name, SCHEME), {}).values())]
    if not names:
        return []
    seconds = ", ".join(f"{NAMES[name]} {least_seconds(costs[name, SCHEME].values())}" for name in names)
    return [f"- **What a method takes**, alone on its GPU, once its process has compiled, in seconds: {seconds}."]


def why_said(folder: Path, student: str | None) -> list[str]:
    content = read_object(folder / "why.json")
    if not content or content["student"] != student or not content["grace"]["entropy"]:
        return []
    grace, rounded = content["grace"], content["rtn_minmax"]
    one, gate = grace["entropy"]["all"], grace["gate"]
    r, linears = one["pearson"], rounded["layers"]["linears"]
    sums = {kind: sum(own["kl"] for own in linears if own["linear"] == kind) for kind in {o["linear"] for o in linears}}
    worst = [f"`{kind.rpartition('.')[2]}`" for kind in sorted(sums, key=sums.__getitem__, reverse=True)[:3]]
    layers = [
        _words([str(one["layer"]) for one in sorted(each["layers"]["layers"], key=lambda one: -one["kl"])[:3]])
        for each in (rounded, grace)
    ]
    bins = one["equal_counts"]
    return [
        f"- **Why** ({grace['data']['num_rows']:,} questions): the teacher's entropy predicts its errors (Pearson r "
        f"{_number(r['r'], 2)} [{_number(r['low'], 2)}, {_number(r['high'], 2)}] over {one['num_tokens']:,} tokens; R² "
        f"{_number(bins['line']['r_squared'], 2)} over {len(bins['bins'])} bins of equal counts); its gate is "
        f"{_number(gate['mean_right'], 2)} where it is right and {_number(gate['mean_wrong'], 2)} where it is "
        f"wrong. CKA with the teacher rises from {_number(grace['cka_before']['tapped'], 2)} to "
        f"{_number(grace['cka']['tapped'], 2)}. Rounding hurts most in {_words(worst)}, and in layers "
        f"{layers[0]}; GRACE is left with most in layers {layers[1]}. Of all layers "
        f"together the KL is {_number(rounded['layers']['whole']['kl'], 3)} nats by rounding and "
        f"{_number(grace['layers']['whole']['kl'], 3)} of GRACE (of linears only rounding's are taken one by one)."
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def runtimes_said(folder: Path, runs: Runs) -> list[str]:
    """If the model that was asked is the GRACE of one of these rows."""
    content = read_object(folder / "runtimes.json")
    made = {row["weights"] for row in runs.get(("grace", SCHEME), {}).values() if "weights" in row}
    if content.get("weights") not in made:
        return []
    found = content["answers"]
    titles = {"llama_cpp": "llama.cpp", "vllm": "vLLM's CPU build"}
    told = [
        f"{titles[name]} {sum(one['said'][name] == one['said']['engine'] for one in found)} times "
        f"({sum(one['right'][name] for one in found)} right)"
        for name in titles
        if found and name in found[0]["said"]
    ]
    if not told:
        return []
    ours = sum(one["right"]["engine"] for one in found)
    return [
        f"- **In other programs** GRACE's student answers {len(found)} held-out questions as in our engine "
        f"({ours} right) in {_words(told)}."
    ]


def language_said(runs: Runs, small: Runs) -> list[str]:
    """Of SmolLM2 alone: itself, before it was rounded, is the teacher."""
    if not {("student", "bf16"), *((name, SCHEME) for name in ("rtn_minmax", "rtn", *SEARCHED))} <= runs.keys():
        return []
    s = Said(runs)
    more = [100 * math.expm1(s.mean(name, text_loss) - s.mean("student", text_loss)) for name in ("rtn_minmax", "rtn")]
    lines = [
        f"- **Four bits cost** {more[0]:.0f} % of perplexity with min-max scales, {more[1]:.0f} with MSE scales.",
        "- **Perplexity and KL to BF16**, best first: "
        + s.listed(s.ordered(COMPARED, text_loss, sign=1), s.both)
        + f". GRACE - QAT: log perplexity {s.gap('GRACE - QAT', 'log perplexity')}, KL "
        f"{s.gap('GRACE - QAT', 'KL to BF16')}; GRACE - plain distillation: log perplexity "
        f"{s.gap('GRACE - QAT with plain distillation', 'log perplexity')}, KL "
        f"{s.gap('GRACE - QAT with plain distillation', 'KL to BF16')}.",
    ]
    if ("awq_signed", SCHEME) in small:
        t = Said(small)
        rules = t.ordered((*ROUNDED, *OTHER_RULES), text_loss, sign=1)
        lines.append(
            "- **Scale rules without training** (`small`): "
            + "; ".join(f"{LABELS[name]} {t.both(name)}" for name in rules)
            + "."
        )
    if ("sft", "bf16") in runs:
        lines.append(
            f"- **Training moves the model, too**: fine-tuned as long in BF16 it has a perplexity of "
            f"{s.perplexity('sft')} and a KL to itself before of {s.kl('sft')}."
        )
    if set(SEARCHED) <= {name for name, scheme in runs if scheme == "w3g64"}:
        names = s.ordered((*ROUNDED, *SEARCHED), text_loss, "w3g64", 1)
        shown = s.listed(names, partial(s.perplexity, scheme="w3g64"))
        lines.append(f"- **At three bits** (one seed): {shown}.")
    lines += _parts_said(s) + _variants_said(s)
    if "awq_signed" in {name for name, _ in small} and ("from_signed_awq", SCHEME) in runs:
        t = Said(small)
        lines.append(
            "- **AWQ with signed scales**, from which `from_signed_awq` goes on, has a KL of "
            f"{t.kl('awq_signed')} and a perplexity of {t.perplexity('awq_signed')}; trained, "
            f"{s.kl('from_signed_awq')} and {s.perplexity('from_signed_awq')}."
        )
    once = [name for name in VARIANTS if 0 < len(runs.get((name, SCHEME), ())) < len(runs["grace", SCHEME])]
    if once:
        seed = min(seed for seed in runs["grace", SCHEME] if seed is not None)
        first: Runs = {("grace", SCHEME): {seed: runs["grace", SCHEME][seed]}}
        one_seed: Runs = {(name, SCHEME): {seed: row} for name in once for row in [runs[name, SCHEME].get(seed)] if row}
        t = Said(one_seed)
        lines.append(
            "- **Other changes**, the first seed of each, beside GRACE's "
            f"({Said(first).perplexity('grace')}, KL {Said(first).kl('grace')}), best perplexity first: "
            + ", ".join(f"`{name}` {t.both(name)}" for name in t.ordered(once, text_loss, sign=1))
            + "."
        )
    return lines
