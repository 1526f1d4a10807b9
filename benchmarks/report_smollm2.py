"""docs/results.md: what the rows that smollm2.py left say, in sentences and tables, and the table in README.md.

    python benchmarks/report_smollm2.py

Only what stands between the two marks of a page is written: sentences by ``smollm2_said.py``, differences by
``smollm2_pairs.py``. A share of loss recovered is (x - RTN) / (BF16 student - RTN), on the log of the perplexity and on
right answers, with RTN by min-max scales as the field uses it; its interval is over the same units as a difference's.
"""

from __future__ import annotations

import argparse
import html
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2_again import again_table, is_same
from smollm2_jobs import ABLATIONS, OTHER_RULES, OWN_RATE, ROUNDED, SCHEME, SEARCHED, VARIANTS
from smollm2_pairs import pair_table, pairs_of, pairs_with_grace
from smollm2_rows import (
    LANGUAGE_OUT,
    MINUTES_FILE,
    OUT,
    STAGES_FILE,
    key_of,
    read_object,
    read_rows,
    read_stages,
    validation_score,
)
from smollm2_runs import (
    LABELS,
    Runs,
    cell,
    collect,
    collect_all,
    is_untrained,
    least_seconds,
    minutes_of,
    provenance,
    recovered,
    scheme_of,
    table_of,
    values,
)
from smollm2_said import language_said, pair_said, runtimes_said, why_said
from smollm2_units import (
    agreement,
    divergence,
    suite,
    test_right,
    text_loss,
)

PAGE, README = Path("docs/results.md"), Path("README.md")
BEGIN, END = "<!-- smollm2:begin (benchmarks/report_smollm2.py) -->", "<!-- smollm2:end -->"
EARLIER = "earlier_pair"
"""A folder beside the rows: those of another pair."""

RUNTIMES = {"engine": "our engine", "llama_cpp": "llama.cpp (xllamacpp)", "vllm": "vLLM, CPU build"}
COLUMNS = ("seeds", "toy suite %", "questions %", "perplexity", "KL to BF16", "same word %", "questions given back",
           "perplexity given back", "least seconds")  # fmt: skip


def method_table(
    runs: Runs, scheme: str, names: Sequence[str], is_timed: bool = True, costs: Runs | None = None
) -> list[str]:
    """A line a method; columns that nobody fills are left out. Its time is that of ``costs``, or of rows that ran
    beside no other."""
    lines: list[list[str]] = []
    for name in names:
        key = (name, scheme_of(name, scheme))
        own = runs.get(key, {})
        if not own:
            continue
        is_whole = key[1] == "bf16"
        cells = [
            LABELS.get(name, name),
            str(len(own)) if None not in own else "",
            cell(values(runs, key, suite)),
            cell(values(runs, key, test_right)),
            cell(values(runs, key, text_loss), 2, math.exp),
            cell(values(runs, key, divergence), 3),
            cell(values(runs, key, agreement), 1),
            "" if is_whole else recovered(runs, name, scheme, test_right),
            "" if is_whole else recovered(runs, name, scheme, text_loss),
            least_seconds((costs or runs).get(key, {}).values()) if is_timed else "",
        ]
        lines.append(cells)
    return table_of((scheme.upper(), *COLUMNS), lines)


def benchmark_table(runs: Runs, scheme: str, names: Sequence[str]) -> list[str]:
    tasks = next((list(row["suite"]) for own in runs.values() for row in own.values() if row["suite"]), [])
    if not tasks:
        return []
    lines = ["| % | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name in names:
        own = runs.get((name, scheme_of(name, scheme)), {})
        if own:
            cells = [cell([100 * row["suite"][task]["value"] for row in own.values()], 1) for task in tasks]
            lines.append(f"| {LABELS.get(name, name)} | " + " | ".join(cells) + " |")
    return lines


def cost_line(folder: Path, student: str) -> list[str]:
    """What the whole comparison took, from the first stage to the headline; nothing of another student."""
    stages = read_stages(folder / STAGES_FILE)
    if stages.get("student", {}).get("weights") != student:
        return []
    parts = {f"`{name}`": one["seconds"] / 60 for name, one in stages.items()}
    clock = [one for one in read_rows(folder / MINUTES_FILE) if one["student"] == student]
    for name in ("search", "headline"):
        rows = [row for row in read_rows(folder / f"{name}.jsonl") if row["student"] == student]
        took = [one["seconds"] * one["gpus"] / 60 for one in clock if one["command"] == name]
        if rows:
            parts[f"{name} ({len(rows)} rows)"] = sum(took) or minutes_of(rows)
    shown = ", ".join(f"{name} {minutes:.1f}" for name, minutes in parts.items())
    return [f"GPU minutes: {shown}; {sum(parts.values()):.0f} in all."]


def section(title: str, *parts: list[str]) -> list[str]:
    own = [part for part in parts if part]
    return [f"### {title}", "", *(line for part in own for line in (*part, ""))] if own else []


def pages(folder: Path, images: Path) -> list[str]:
    """Every section whose rows are there; pictures are written into ``images``."""
    lines, student = pair_pages(folder, "")
    lines += section("The headline made again", *again_pages(folder))
    lines += section("At other rates", *rates_pages(folder))
    lines += section("Why", why_pages(folder, student, images))
    lines += section("The W4 student in other programs", runtime_pages(folder))
    lines += pair_pages(folder / EARLIER, "An earlier pair: ")[0]
    lines += section("An earlier pair: the headline made again", *again_pages(folder / EARLIER))
    small, rows = collect([folder / "small.jsonl"])
    language = folder / LANGUAGE_OUT.name
    runs, own = collect_all(language)
    lines += section("The language alone: what it says", language_said(runs, small))
    lines += comparison(language, "The language alone: ", runs, own, {})
    if rows:
        table = method_table(small, SCHEME, ("student", *ROUNDED, *OTHER_RULES, *SEARCHED))
        lines += section("The language alone, one seed, at a rate that was not searched", [provenance(rows)], table)
    return lines or ["No rows yet: `make smollm2-small`, `make smollm2-headline`.", ""]


def pair_pages(folder: Path, title: str) -> tuple[list[str], str | None]:
    """(what a pair says, and its tables; the hash of its student)."""
    runs, rows = collect_all(folder)
    student = rows[0]["student"] if rows else None
    costs = costs_of(folder, student)
    said = pair_said(folder, runs, costs) + why_said(folder, student) + runtimes_said(folder, runs)
    whose = "what it says" if title else "what the pair says"
    return section(_headed(title, whose), said) + comparison(folder, title, runs, rows, costs), student


def costs_of(folder: Path, student: str | None) -> Runs:
    """Rows that were made alone, of this student, but for those that waited for what their process compiled."""
    runs, rows = collect([folder / "costs.jsonl"])
    if not rows or rows[0]["student"] != student:
        return {}
    return {key: {seed: row for seed, row in own.items() if not row.get("compiled")} for key, own in runs.items()}


WIDTHS = {"w4g64": "four bits, groups of 64", "w8g64": "eight bits", "w3g64": "three bits", "w4g32": "groups of 32"}


def comparison(folder: Path, title: str, runs: Runs, rows: Sequence[dict[str, Any]], costs: Runs) -> list[str]:
    """The tables of headline, others and variants of a folder; ``title`` begins each."""
    if not rows:
        return []
    is_timed = folder.name != LANGUAGE_OUT.name
    names = ("teacher", "student", "sft", *ROUNDED, *OTHER_RULES, *SEARCHED)
    lines: list[str] = []
    for scheme, width in WIDTHS.items():
        if any(key[1] == scheme for key in runs):
            lines += section(
                _headed(title, width),
                [provenance(rows)] if not lines else [],
                cost_line(folder, rows[0]["student"]) if not lines else [],
                method_table(runs, scheme, names, is_timed, costs),
                benchmark_table(runs, scheme, names),
                pair_table(runs, pairs_of(scheme)),
            )
    for own, what in ((ABLATIONS, "GRACE without each part"), (tuple(VARIANTS), "what might be better")):
        if any((name, SCHEME) in runs for name in own):
            table = method_table(runs, SCHEME, ["grace", *own], is_timed=False)
            lines += section(_headed(title, what), table, pair_table(runs, pairs_with_grace(own)))
    lines += section(_headed(title, "the search of rates"), rate_table(folder, rows[0]["student"]))
    return lines


def beside_headline(folder: Path, name: str) -> tuple[Runs, Runs, list[dict[str, Any]]]:
    """(the headline's runs, those of another file, this file's rows), if both are of one student; else nothing."""
    first, own = collect([folder / "headline.jsonl"])
    other, rows = collect([folder / name])
    return (first, other, rows) if own and rows and own[0]["student"] == rows[0]["student"] else ({}, {}, [])


def again_pages(folder: Path) -> list[list[str]]:
    """The headline of a student made again, by other processes or on other machines, with its stages and search."""
    first, again, rows = beside_headline(folder, "again/headline.jsonl")
    if not rows:
        return []
    told = [stages_line(path) for path in sorted((folder / "again").glob(f"{Path(STAGES_FILE).stem}*.json"))]
    told += search_again_line(folder, rows[0]["student"])
    table = again_table(first, again, SCHEME, ("teacher", "student", *ROUNDED, *SEARCHED))
    return [[provenance(rows)], told, table]


def search_again_line(folder: Path, student: str) -> list[str]:
    """How many rows of the search were made again, and how many of them are the same."""
    first, again = (
        {key_of(row): row for row in read_rows(own / "search.jsonl") if row["student"] == student}
        for own in (folder, folder / "again")
    )
    both = [key for key in first if key in again]
    same = sum(is_same({None: first[key]}, {None: again[key]}) for key in both)
    return [f"- Of {len(first)} rows of the search {len(both)} were made again: {same} are the same."] if both else []


def rates_pages(folder: Path) -> list[list[str]]:
    """Trained rows of the headline's student at other rates than it has, beside what was not trained."""
    first, others, rows = beside_headline(folder, "other_rates.jsonl")
    if not rows:
        return []
    beside = {key: seeds for key, seeds in first.items() if is_untrained(seeds)}
    rates = {name: next(iter(seeds.values()))["rate"] for (name, _), seeds in others.items()}
    told = "Rates: " + ", ".join(f"{LABELS[name]} {rate:g}" for name, rate in rates.items()) + "."
    table = method_table({**beside, **others}, SCHEME, ("student", "rtn_minmax", *SEARCHED), is_timed=False)
    return [[provenance(rows)], [told], table]


def stages_line(path: Path) -> str:
    """What the stages of one machine were, and took."""
    made = read_stages(path)
    shown = (f"`{name}` {one['weights'][:8]}, {one['seconds'] / 60:.1f} GPU minutes" for name, one in made.items())
    commits = sorted({one["commit"] for one in made.values()})
    return f"- Stages at commit {', '.join(commits)}: {'; '.join(shown)}."


def _headed(title: str, what: str) -> str:
    return title + what if title else what[0].upper() + what[1:]


def rate_table(folder: Path, student: str) -> list[str]:
    """What the search found: right answers in per cent, or perplexity where no questions were asked."""
    rows = [row for row in read_rows(folder / "search.jsonl") if row["student"] == student]
    rates = sorted({row["rate"] for row in rows})
    if not rates:
        return []
    found = {(row["name"], row["rate"]): row for row in rows}
    has_questions = all(row["questions"] for row in rows)
    lines = [
        f"| {'right %' if has_questions else 'perplexity'}, validation | " + " | ".join(f"{r:g}" for r in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    searched = [*SEARCHED, *OWN_RATE, *(row["name"] for row in rows)]
    for name in (name for name in dict.fromkeys(searched) if any(key[0] == name for key in found)):
        own = [found.get((name, rate)) for rate in rates]
        scores = [None if row is None else validation_score(row) for row in own]
        shown = ["" if s is None else f"{100 * s if has_questions else math.exp(-s):.2f}" for s in scores]
        lines.append(f"| {LABELS.get(name, f'`{name}`')} | " + " | ".join(shown) + " |")
    return lines


WHY = ("grace/entropy", "grace/gate", "grace/cka", "grace/layers", "rtn_minmax/layers", "rtn_minmax/linears")
"""Which of whose pictures stand on the page."""


def why_pages(folder: Path, student: str | None, images: Path) -> list[str]:
    """Numbers and pictures of ``smollm2_why.py``, if they are of this student; pictures are written into ``images``."""
    content = read_object(folder / "why.json")
    if student is None or content.get("student") != student:
        return []
    from grace_vlm.evals.why.pictures import pictures_of
    from grace_vlm.evals.why.summary import summary_lines

    lines: list[str] = []
    drawn = {}
    for name in ("grace", "rtn_minmax"):
        drawn[name] = pictures_of(content[name])
        numbers = [f"| {what.strip()} | {value} |" for what, value in summary_lines(content[name])]
        said = f"{LABELS[name]}, {SCHEME.upper()}, {content[name]['data']['num_rows']:,} held-out questions"
        lines += [f"| {said} | |", "|---|---|", *numbers, ""]
    for place in WHY:
        name, _, picture = place.partition("/")
        if text := drawn[name].get(f"{picture}.svg"):  # too few rows have no picture
            file = images / f"smollm2_{name}_{picture}.svg"
            file.write_text(text, encoding="utf-8")
            lines.append(f"![{picture} of {LABELS[name]}](images/{file.name})")
    one = content["grace"]
    where = f"{one['dtype']} on {one['hardware']}, torch {one['versions']['torch']}, commit {content['commit']}"
    limit = one["data"]["num_rows"]
    return [*lines, "", f"{where}; `python benchmarks/smollm2_why.py --limit {limit}`."]


def runtime_pages(folder: Path) -> list[str]:
    """What ``smollm2_runtimes.py`` found: who says what our engine says, and one question of each source."""
    content = read_object(folder / "runtimes.json")
    if not content:
        return []
    found = content["answers"]
    lines = ["| asked | as our engine | right |", "|---|---|---|"]
    for name in found[0]["said"]:
        title = " ".join((RUNTIMES[name], content["versions"].get(name, "")))
        same = sum(one["said"][name] == one["said"]["engine"] for one in found)
        lines.append(f"| {title.strip()} | {same} | {sum(one['right'][name] for one in found)} |")
    lines += ["", "| picture | question | answer | gold |", "|---|---|---|---|"]
    for one in found:
        if one["picture"] is not None:
            cells = (one["question"], one["said"]["engine"], one["gold"])
            asked, said, gold = ("<br>".join(html.escape(text).replace("|", "\\|").splitlines()) for text in cells)
            shown = f"![{one['source']}]({os.path.relpath(folder / 'chat' / one['picture'], PAGE.parent)})"
            lines.append(f"| {shown} | {asked} | {said} | {gold} |")
    about = f"{content['model']} (weights `{content['weights'][:12]}`), {len(found)} held-out questions"
    engine = f"our engine on {content['device']}, commit {content['commit']}"
    return [*lines, "", f"{about}; {engine}; `python benchmarks/smollm2_runtimes.py MODEL --count {len(found)}`."]


def readme_table(folder: Path) -> list[str]:
    """A line a method of both headlines."""
    pictures, language = (collect([own / "headline.jsonl"])[0] for own in (folder, folder / LANGUAGE_OUT.name))
    lines: list[list[str]] = []
    for name in ("student", *ROUNDED, *SEARCHED):
        key = (name, scheme_of(name, SCHEME))
        cells = [cell(values(language, key, text_loss), 1, math.exp), cell(values(pictures, key, test_right), 1)]
        back = "" if name == "student" else recovered(pictures, name, SCHEME, test_right)
        lines.append([LABELS[name], *cells, back])
    head = ("W4, groups of 64", "language alone: perplexity", "with pictures: questions %", "lost points given back")
    return table_of(head, lines)


def write_between(page: Path, lines: Sequence[str]) -> None:
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{page} lacks the marks {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{after}", encoding="utf-8")
    print(f"wrote {page}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_between(PAGE, pages(OUT, PAGE.parent / "images"))
    write_between(README, [*readme_table(OUT), ""])


if __name__ == "__main__":
    main()
