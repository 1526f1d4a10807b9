"""``grace compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from grace_vlm.cli.output import emit_json, print_table, say
from grace_vlm.cli.scores import one_profile
from grace_vlm.errors import ConfigError

if TYPE_CHECKING:
    from grace_vlm.evals.suite.flips import Comparison as SuiteComparison

HELP = """Compare models on the same questions and write one self-contained HTML page.

PATH is a folder of an earlier comparison or demo (its page is made again), two or more models with --data, or two
folders of grace eval --suite: which answers turned, by benchmark and category, with pictures if --data is given.
Example: grace compare runs/demo
Example: grace compare runs/eval-bf16 runs/eval-w4 --data benchmarks/ --out runs/flips"""


def compare(
    paths: list[Path] = typer.Argument(..., help="A demo folder; model, run and packed folders; two evaluations."),
    data: Path = typer.Option(
        None, "--data", help="Rows with one question each, for models; the benchmarks' folder, for evaluations."
    ),
    out: Path = typer.Option(Path("runs/compare"), "--out", help="Where answers and the page go; not for a demo."),
    profile: list[str] = typer.Option(["strict"], "--profile", help="Of two evaluations: strict, card, lmms or kit."),
    baseline: str = typer.Option(None, "--baseline", help="Folder name of the baseline; default: the first."),
    cpu_activations: str = typer.Option("fp32", "--cpu-activations", help="fp32: exact; int8: faster, rounded."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    import json

    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.evals.compare import Comparison, Contestant, table
    from grace_vlm.evals.report import render_report
    from grace_vlm.evals.run import EXACT
    from grace_vlm.formats.folder import is_model
    from grace_vlm.models.load import resolve_source

    if any((path / "run.json").is_file() for path in paths):
        _suites(paths, data, out, profile, baseline, as_json)
        return
    if len(paths) == 1 and (paths[0] / "results.json").is_file():
        page = render_report(paths[0])
        result = json.loads((paths[0] / "results.json").read_text(encoding="utf-8"))
    elif data is None:
        missing = "is a model" if is_model(paths[0]) else "holds no results.json"
        missing = missing if paths[0].exists() else "does not exist"
        raise ConfigError(
            f"{paths[0]} {missing}; give models and --data FILE to compare them, or two --out of grace eval"
        )
    else:
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            raise ConfigError(f"two of the models have one folder name ({', '.join(names)}); rename one")
        chosen = baseline or names[0]
        if chosen not in names:
            raise ConfigError(f"baseline {chosen!r} is not among the models ({', '.join(names)})")
        for path in paths:  # before the first is asked for minutes
            if not path.exists():
                resolve_source(str(path))
        options = EngineOptions(cpu_activations=cpu_activations)  # type: ignore[arg-type]
        comparison = Comparison(data, out, chosen, teacher=None, say=say, options=options)
        for path in sorted(paths, key=lambda path: path.name != chosen):
            metrics = path / "metrics.jsonl"
            comparison.add(Contestant(path.name, path.name, path, "", "", metrics if metrics.is_file() else None))
        how = "" if options == EXACT else f" --cpu-activations {cpu_activations}"
        result = comparison.finish("Comparison", f"grace compare{how}")
        page = render_report(out)
    if as_json:
        emit_json({"page": str(page), "rows": result["rows"]})
    else:
        print_table(*table(result["rows"]))
        print(f"page: {page}")


def _suites(
    paths: list[Path], data: Path | None, out: Path, given: list[str], baseline: str | None, as_json: bool
) -> None:
    """Two evaluations by ``grace eval --suite``."""
    from grace_vlm.evals.suite.flips import asked_again, compare_suites
    from grace_vlm.evals.suite.flips_page import write_flips

    if len(paths) != 2:
        raise ConfigError(f"{len(paths)} folders were given; evaluations are compared two at a time: base, then other")
    checked = one_profile(given)
    base, own = paths
    if baseline is not None and baseline != base.name:
        if baseline != own.name:
            raise ConfigError(f"--baseline is {baseline}; expected {base.name} or {own.name}")
        base, own = own, base
    comparison = compare_suites(base, own, checked)
    comparison, asked = (comparison, {}) if data is None else asked_again(comparison, base, data, checked)
    plain = (base.name, own.name) if base.name != own.name else (str(base), str(own))
    names = _labelled(plain[0], base), _labelled(plain[1], own)
    page = write_flips(out, comparison, names, asked)
    if as_json:
        emit_json({"page": str(page), **_document(comparison)})
        return
    print(f"{names[1]} against {names[0]}, profile {checked}:\n")
    _print_counts(comparison)
    if data is None:
        say("prompts and pictures are left out of the page; give --data, the folder of the benchmarks")
    print(f"page: {page}")


def _labelled(name: str, folder: Path) -> str:
    """With the control that an evaluation is, if it is one."""
    from grace_vlm.evals.suite.tables import control_of

    control = control_of(folder)
    return name if control is None else f"{name} [control: {control}]"


def _document(comparison: SuiteComparison) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "profile": comparison.profile,
        "counts": [asdict(count) for count in comparison.counts],
        "holm": list(comparison.adjusted),
    }


def _print_counts(comparison: SuiteComparison) -> None:
    from grace_vlm.evals.tasks.registry import TASKS

    rows = [
        (
            f"  {count.category or '(none)'}" if count.category is not None else TASKS[count.task].about.title,
            str(count.num_rows),
            str(count.num_lost),
            str(count.num_won),
            f"{count.p_value:.3f}",
        )
        for count in comparison.counts
    ]
    print_table(("benchmark, category", "rows", "lost", "won", "McNemar p"), rows)
