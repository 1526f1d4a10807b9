"""``grace compare``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import emit_json, print_table, say
from grace_vlm.errors import ConfigError

HELP = """Compare models on the same questions and write one self-contained HTML page.

PATH is a folder of an earlier comparison or demo (its page is made again), or two or more models with --data.
Example: grace compare runs/demo"""


def compare(
    paths: list[Path] = typer.Argument(..., help="A demo folder, or model, run and packed folders."),
    data: Path = typer.Option(None, "--data", help="Rows with one question each, for models."),
    out: Path = typer.Option(Path("runs/compare"), "--out", help="Where answers and the page go, for models."),
    baseline: str = typer.Option(None, "--baseline", help="Folder name of the baseline; default: the first."),
    cpu_activations: str = typer.Option("fp32", "--cpu-activations", help="fp32: exact; int8: faster, rounded."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    import json

    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.evals.compare import Comparison, Contestant, table
    from grace_vlm.evals.report import render_report
    from grace_vlm.evals.run import EXACT

    if len(paths) == 1 and (paths[0] / "results.json").is_file():
        page = render_report(paths[0])
        result = json.loads((paths[0] / "results.json").read_text(encoding="utf-8"))
    elif data is None:
        raise ConfigError(f"{paths[0]} holds no results.json; give models and --data FILE to compare them")
    else:
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            raise ConfigError(f"two of the models have one folder name ({', '.join(names)}); rename one")
        chosen = baseline or names[0]
        if chosen not in names:
            raise ConfigError(f"baseline {chosen!r} is not among the models ({', '.join(names)})")
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
