"""Writes docs/recipes.md, docs/cli.md, the plots and the measured tables of other pages: `make docs`. A test checks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
COMMANDS = (
    "demo",
    "data prepare",
    "data check",
    "plan",
    "train",
    "teacher cache",
    "quantize",
    "pack",
    "verify",
    "inspect",
    "eval",
    "scores",
    "chat",
    "generate",
    "compare",
    "analyze",
    "bench",
    "doctor",
)


def recipes() -> str:
    """Every key of a recipe with its default."""
    from pydantic import BaseModel

    from grace_vlm.train.config import Recipe

    lines = [
        "# Recipes",
        "",
        "A recipe is YAML; `grace train RECIPE key=value ...` overrides single keys. Unknown keys are errors, and a",
        "default stands in one place only (`src/grace_vlm/train/config.py`, which `make docs` made this page from).",
        "",
        "| key | default | what it is |",
        "|---|---|---|",
    ]

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner: Any = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                walk(inner, f"{prefix}{name}.")
                continue
            default = "required" if field.is_required() else f"`{field.default}`"
            lines.append(f"| `{prefix}{name}` | {default} | {field.description} |")

    walk(Recipe, "")
    return "\n".join(lines) + "\n"


def cli() -> str:
    """The help of every command."""
    parts = ["# Command line\n\nMade by `make docs` from the commands' own help.\n", _exit_codes()]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    for command in ("", *COMMANDS):
        words = [sys.executable, "-m", "grace_vlm.cli.main", *command.split(), "--help"]
        text = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout
        body = "\n".join(line.rstrip() for line in text.strip().splitlines()).replace(
            "python -m grace_vlm.cli.main", "grace"
        )
        parts.append(f"## grace {command}\n\n```\n{body}\n```\n".replace("## grace \n", "## grace\n"))
    return "\n".join(parts)


def _exit_codes() -> str:
    """A line for each error of ``errors.py``."""
    from grace_vlm.errors import GraceError

    known = sorted(GraceError.__subclasses__(), key=lambda error: error.exit_code)
    rows = "\n".join(f"| {one.exit_code} | {(one.__doc__ or '').splitlines()[0]} |" for one in known)
    said = (
        "Every error is one line, `error: ...`, on standard error; what cannot be parsed is 2, a bug of ours 1 with its"
    )
    of_verify = "`verify` and `demo` looked and found something that differs"
    head = f"{said} traceback.\n\n| code | what |\n|---|---|\n| 0 | done |\n| 1 | {of_verify} |\n"
    return f"## Exit codes\n\n{head}{rows}\n"


def training() -> str:
    """docs/training.md with its tables of measurements made from benchmarks/results."""
    text = (HERE / "training.md").read_text(encoding="utf-8")
    return _filled(text, {"memory": _memory_table()})


def scaling() -> str:
    """docs/scaling.md with what was measured on several GPUs."""
    return _filled((HERE / "scaling.md").read_text(encoding="utf-8"), {"scaling": _scaling_table()})


def _scaling_table() -> str:
    """Cases and numbers of processes down, in the order in which they were measured."""
    rows = [row for path in sorted(RESULTS.glob("scaling*.csv")) for row in _plots().read_rows(path)]
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["case"], row["impl"], row["device"]), {})[row["metric"]] = row
    lines = []
    for (case, impl, device), cells in found.items():
        value = {metric: float(row["p50"]) for metric, row in cells.items()}
        spread = f"{float(cells['ms']['p20']):.0f} to {float(cells['ms']['p80']):.0f}"
        where = f"{impl.removeprefix('gpus')} {device.removeprefix('NVIDIA ')}"
        efficiency = f"{value['efficiency']:.3f}" if "efficiency" in value else ""
        peak = f"{value['peak_gib']:.1f}"
        if "teacher_peak_gib" in value:
            peak += f" and {value['teacher_peak_gib']:.1f}"
        lines.append(
            f"| `{case}` | {where} | {value['ms']:.1f} | {spread} | {efficiency} | "
            f"{value['tokens_per_second']:,.0f} | {peak} | {value['sent_gb']:.1f} |"
        )
    return (
        "| case | processes | ms | 20th to 80th percentile | efficiency | tokens/s | GiB of a GPU | GB out of it |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + f"\n\n{_places(rows)}\n"
    )


def _filled(text: str, tables: dict[str, str]) -> str:
    """A page with each table between the marks of its name."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        text = text.split(begin)[0] + begin + table + end + text.split(end)[1]
    return text


def _memory_table() -> str:
    with (RESULTS / "true_size.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = "\n".join(
        f"| {line['student'].partition('/')[2].removesuffix('-Instruct')} | `{line['case']}` | "
        f"{float(line['peak_gib']):.1f} | {float(line['estimated_gib']):.1f} | {float(line['seconds_per_step']):.2f} | "
        f"{float(line['estimated_seconds']):.2f} | {float(line['loader_seconds']):.2f} | "
        f"{int(line['tokens_per_second']):,} |"
        for line in lines
    )
    where = "{hardware}, torch {torch}, transformers\n{transformers}".format(**lines[0])
    return f"""\
| student | case | peak GiB | estimated | s a step | estimated | of it waiting for rows | tokens/s |
|---|---|---|---|---|---|---|---|
{rows}

Random weights, teachers Qwen3-VL-8B and Qwen2-VL-7B; names are rows x tokens x micro-batches, `kept` is without
gradient checkpointing; 52 % of the tokens supervised (Qwen2-VL: 44), 196 (256) visual tokens a row, JPEG pictures
through the loader; {where}; `python benchmarks/bench_true_size.py memory`. A micro-batch costs the host a launch
for every operation of every layer, however small it is: `data.micro_batch_size=8 data.accumulation=64` is the same
published step of 512 rows in a third of the time, for one GiB more.
"""


def kernels() -> str:
    """docs/kernels.md with its tables made from benchmarks/results."""
    text = (HERE / "kernels.md").read_text(encoding="utf-8")
    tables = {
        "linear": "\n".join(_linear_table(path) for path in sorted(RESULTS.glob("w[48]_linear.csv"))),
        "cpu": _cpu_linear_table(_plots().read_rows(RESULTS / "cpu_linear.csv")),
        "cpu_decode": _cpu_decode_table(_plots().read_rows(RESULTS / "cpu_decode.csv")),
    }
    return _filled(text, tables)


def _places(rows: list[dict[str, str]]) -> str:
    """What rows were measured on and at which commits."""
    return "; ".join(
        sorted({"{device}, torch {torch}, Triton {triton}, commit {commit}, {date}".format(**row) for row in rows})
    )


def _linear_table(path: Path) -> str:
    """Layers and numbers of tokens down, implementations across."""
    impls = ("floor", "bf16", "tinygemm", "humming", "gemlite", "ours", "ours_bf16copy")
    found: dict[tuple[str, str], dict[str, float]] = {}
    rows = _plots().read_rows(path)
    for row in rows:
        shape, _, tokens = row["case"].partition("_m")
        found.setdefault((shape, tokens), {})[row["impl"]] = float(row["p50"])
    shown = [impl for impl in impls if any(impl in cells for cells in found.values())]
    lines = []
    for (shape, tokens), cells in found.items():
        peer = min((cells[impl] for impl in ("tinygemm", "humming", "gemlite") if impl in cells), default=None)
        ratios = [cells["ours"] / of if of else None for of in (peer, cells["bf16"])]
        numbers = [
            format(cells[impl], ".3g" if cells[impl] < 100 else ".0f") if impl in cells else "" for impl in shown
        ]
        lines.append(
            f"| {shape} | {tokens} | {' | '.join(numbers)} | {' | '.join(f'{r:.2f}' if r else '' for r in ratios)} |"
        )
    where = _places(rows)
    return (
        f"{path.name[1]} bits:\n\n| layer | tokens | {' | '.join(shown)} | ours / best peer | ours / bf16 |\n"
        f"|---|---|{'---|' * len(shown)}---|---|\n" + "\n".join(lines) + f"\n\n{where}\n"
    )


def _cpu_linear_table(rows: list[dict[str, str]]) -> str:
    """Layers and numbers of tokens down, implementations across, then ratios of the same run."""
    peers = ("torch_int4pack", "onnxruntime_l4", "openvino")
    shown = ("read", "ours_int8", *peers, "ours_fp32", "torch_fp32")
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        shape, _, tokens = row["case"].partition("_m")
        found.setdefault((shape, int(tokens)), {})[row["impl"]] = float(row["p50"])
    shapes = list(dict.fromkeys(shape for shape, _ in found))
    lines = []
    for shape, tokens in sorted(found, key=lambda case: (shapes.index(case[0]), case[1])):
        cells = found[shape, tokens]
        best = min(cells[peer] for peer in peers if peer in cells)
        numbers = " | ".join(f"{cells[impl]:,.0f}" if impl in cells else "" for impl in shown)
        ours = cells["ours_int8"]
        lines.append(f"| {shape} | {tokens} | {numbers} | {ours / cells['read']:.2f} | {ours / best:.2f} |")
    packages = sorted({row["driver"] for row in rows if row["driver"]})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    where = "{device}, torch {torch}, {packages}, commit {commits}, {date}".format(
        **{**rows[0], "packages": ", ".join(packages), "commits": commits}
    )
    return (
        f"| layer | tokens | {' | '.join(shown)} | ours_int8 / read | ours_int8 / best of the three |\n"
        f"|---|---|{'---|' * len(shown)}---|---|\n" + "\n".join(lines) + f"\n\n{where}\n"
    )


def _cpu_decode_table(rows: list[dict[str, str]]) -> str:
    """Cases and metrics down, programs across, then how much faster ours is."""
    shown = ("ours", "llama_cpp", "torch_fp32")
    units = {"ttft_s": "s to the first token", "tok_s": "tokens a second", "body_ms": "ms a token, layers alone"}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["metric"]), {})[row["impl"]] = float(row["p50"])
    lines = []
    for (case, metric), cells in found.items():
        gain = cells["ours"] / cells["llama_cpp"]
        numbers = " | ".join(f"{cells[impl]:.3g}" if impl in cells else "" for impl in shown)
        lines.append(f"| {case} | {units[metric]} | {numbers} | {gain if metric == 'tok_s' else 1 / gain:.2f} |")
    driver = next(row["driver"] for row in rows if row["driver"])
    where = "{device}, torch {torch}, {driver}, commit {commit}, {date}".format(**{**rows[0], "driver": driver})
    return (
        f"| case | | {' | '.join(shown)} | ours is faster than llama.cpp by |\n|---|---|{'---|' * len(shown)}---|\n"
        + "\n".join(lines)
        + f"\n\n{where}\n"
    )


def performance() -> str:
    """docs/performance.md with its tables made from benchmarks/results."""
    text = (HERE / "performance.md").read_text(encoding="utf-8")
    tables = {
        "loss": _plots().table(_plots().read_rows(RESULTS / "loss.csv")),
        "fakequant": _fakequant_table(_plots().read_rows(RESULTS / "fakequant.csv")),
        "train": _train_table(),
        "decode": _decode_table(),
        "prefill": _cases_table("prefill", {"ms": ".1f", "tok_s": ",.0f"}),
        "load": _cases_table("load", LOAD_METRICS),
    }
    return _filled(text, tables)


LOAD_METRICS = {
    **{f"first_token_p{percent}_ms": ",.0f" for percent in (50, 95, 99)},
    **{f"between_tokens_p{percent}_ms": ".1f" for percent in (50, 95, 99)},
    "tok_s": ",.0f",
}
"""Of load.csv, in the order shown, and how each is written."""


def _cases_table(name: str, metrics: dict[str, str]) -> str:
    """Cases and implementations down, metrics across."""
    rows = _plots().read_rows(RESULTS / f"{name}.csv")
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["impl"]), {})[row["metric"]] = float(row["p50"])
    lines = [
        f"| `{case}` | `{impl}` | {' | '.join(format(cells[metric], form) for metric, form in metrics.items())} |"
        for (case, impl), cells in found.items()
    ]
    heads = " | ".join(metric.replace("_", " ") for metric in metrics)
    return f"| case | | {heads} |\n|---|---|{'---|' * len(metrics)}\n" + "\n".join(lines) + f"\n\n{_places(rows)}\n"


def _train_table() -> str:
    """Cases down, the official algorithm and ours across; those of another GPU name it."""
    rows = [row for path in sorted(RESULTS.glob("train_step*.csv")) for row in _plots().read_rows(path)]
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["case"], row["device"]), {})[f"{row['impl']} {row['metric']}"] = row
    lines = []
    for (case, device), cells in found.items():
        ours, official = cells.get("ours ms"), cells.get("official ms")

        def said(key: str, form: str, cells: dict[str, dict[str, str]] = cells) -> str:
            return format(float(cells[key]["p50"]), form) if key in cells else ""

        spread = f"{float(ours['p20']):.0f} to {float(ours['p80']):.0f}" if ours else ""
        ratio = f"{float(official['p50']) / float(ours['p50']):.1f}x" if ours and official else ""
        gpu = "" if "H100" in device else f" ({device.removeprefix('NVIDIA ')})"
        lines.append(
            f"| `{case}`{gpu} | {said('official ms', '.0f')} | {said('ours ms', '.0f')} | {spread} | {ratio} | "
            f"{said('ours tokens_per_second', ',.0f')} | {said('official peak_gib', '.1f')} | "
            f"{said('ours peak_gib', '.1f')} |"
        )
    where = _places(rows)
    return (
        "| case | official, ms | ours, ms | 20th to 80th percentile | | tokens/s | official, GiB | ours, GiB |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + f"\n\n{where}\n"
    )


def _decode_table() -> str:
    """Implementations down; cases of decode.csv, then memory and the first token, across."""
    rows = [row for name in ("decode", "memory", "ttft") for row in _plots().read_rows(RESULTS / f"{name}.csv")]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        found.setdefault(row["impl"], {})[row["case"], row["metric"]] = row["p50"]
    cases = ["b1_c512", "b16_c512", "b64_c512", "b1_c8192"]
    columns = [*((case, "tok_s", ",.0f") for case in cases), ("all", "weights_gb", ".2f"), ("img448", "ms", ".1f")]
    lines = []
    for impl, cells in found.items():
        said = [format(float(cells[c, m]), form) if (c, m) in cells else "" for c, m, form in columns]
        lines.append(f"| `{impl}` | {' | '.join(said)} |")
    where = _places(rows)
    heads = [*(f"`{case}`" for case in cases), "weights, GB", "first token, ms"]
    return f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}\n" + "\n".join(lines) + f"\n\n{where}\n"


def _fakequant_table(rows: list[dict[str, str]]) -> str:
    says = {
        "ours": "ours, two launches",
        "ours_torch": "the same in eager torch",
        "official": "official, restated: one micro-batch",
        "floor": "a copy of the 18 bytes a weight",
    }
    lines = [
        f"| {says[row['impl']]} | {float(row['p50']):.1f} | {float(row['p20']):.1f} to {float(row['p80']):.1f} |"
        for row in rows
    ]
    where = "{device}, torch {torch}, Triton {triton}, commit {commit}, {date}".format(**rows[0])
    return "| | ms, median | 20th to 80th percentile |\n|---|---|---|\n" + "\n".join(lines) + f"\n\n{where}\n"


def numerics() -> str:
    """docs/numerics.md with its table made from benchmarks/results."""
    text = (HERE / "numerics.md").read_text(encoding="utf-8")
    table = _divergence().table(_plots().read_rows(RESULTS / "teacher_divergence.csv"))
    return _filled(text, {"divergence": table})


def _divergence() -> Any:
    """``benchmarks/bench_teacher_divergence.py``."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import bench_teacher_divergence

    return bench_teacher_divergence


def engine() -> str:
    """docs/engine.md with its table made from benchmarks/results."""
    text = (HERE / "engine.md").read_text(encoding="utf-8")
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import bench_engine_divergence

    table = bench_engine_divergence.table(_plots().read_rows(RESULTS / "engine_divergence.csv"))
    return _filled(text, {"divergence": table})


def evaluation() -> str:
    """docs/evaluation.md with the table of the tasks."""
    from grace_vlm.evals.tasks.registry import TASKS

    rows = [
        f"| `{name}` ({task.about.title}) | {', '.join(f'`{pattern}`' for pattern in task.about.patterns)} | "
        f"`{task.about.source}` | {task.about.licence} |\n"
        for name, task in TASKS.items()
    ]
    text = (HERE / "evaluation.md").read_text(encoding="utf-8")
    head = "| task | files that are fetched for a hub id | source on the Hub | licence |\n|---|---|---|---|\n"
    return _filled(text, {"tasks": head + "".join(rows), "lmms": _lmms_table(), "suite": _suite_table()})


def _lmms_table() -> str:
    """Tasks down: replies that were compared, and in how many lmms-eval and our profile differ."""
    found = json.loads((HERE.parent / "tests" / "interop" / "results" / "lmms.json").read_text(encoding="utf-8"))
    lines = "".join(
        f"| `{name}` | {one['replies']:,} | {len(one['differences']) + one['drawn']:,} | {one['drawn because']} |\n"
        for name, one in found.items()
    )
    return f"| task | replies | different | because |\n|---|---|---|---|\n{lines}"


def _suite_table() -> str:
    """Runs of a case and their implementations down, in samples a second: of one core's time, or by the clock on a GPU;
    then what ``suite`` is faster by."""
    rows = _plots().read_rows(RESULTS / "eval_suite.csv")
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["metric"] == ("samples_s" if "_gpu" in row["case"] else "samples_cpu_s"):
            found.setdefault((row["case"], row["commit"]), {})[row["impl"]] = float(row["p50"])
    lines = "".join(
        f"| {case} | {commit} | `{impl}` | {value:.1f} | {cells['suite'] / value:.2f} |\n"
        for (case, commit), cells in found.items()
        for impl, value in cells.items()
    )
    head = "| case | commit | | samples/s of processor time; `_gpu`: by the clock | `suite` is faster by |\n"
    head += "|---|---|---|---|---|\n"
    where = "; ".join(sorted({"{device}, torch {torch}, commit {commit}, {date}".format(**row) for row in rows}))
    return f"{head}{lines}\n{where}; `benchmarks/bench_eval_suite.py` says what each is.\n"


def analyze() -> str:
    """docs/analyze.md with the numbers of the demo."""
    return _filled((HERE / "analyze.md").read_text(encoding="utf-8"), {"analyze": _analyze_tables(_analysis())})


ANALYZED = ("entropy", "gate", "cka", "layers", "codes_w4g128")
"""Pictures of the demo's analysis that docs/analyze.md shows."""


def analyze_pictures() -> dict[str, str]:
    """File name -> text of the demo's pictures in docs/images."""
    from grace_vlm.evals.why.pictures import pictures_of

    drawn = pictures_of(_analysis()["whole"])
    return {f"analyze_{name}.svg": drawn[f"{name}.svg"] for name in ANALYZED}


def _analysis() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / "analyze.json").read_text(encoding="utf-8"))
    return content


def _analyze_tables(content: dict[str, Any]) -> str:
    """The first model's numbers, its pictures, and each layer's effect in every model."""
    from grace_vlm.evals.why.summary import summary_lines

    whole, labels = content["whole"], content["labels"]
    numbers = "\n".join(f"| {what.strip()} | {value} |" for what, value in summary_lines(whole))
    shown = "\n".join(f"![{name}](images/analyze_{name}.svg)" for name in ANALYZED)
    models = {content["first"]: whole, **content["others"]}
    heads = [f"layer {one['layer']}" for one in whole["layers"]["layers"]]
    rows = [
        f"| {labels[name]} | "
        + " | ".join(f"{one['output_error']:.3f} / {1000 * one['kl']:.2f}" for one in found["layers"]["layers"])
        + f" | {1000 * found['layers']['whole']['kl']:.2f} | {100 * found['layers']['whole']['flips']:.2f} | "
        + f"{found['cka']['tapped'] - found['cka_before']['tapped']:+.4f} | "
        + ", ".join(f"{part['bits_used']:.2f}" for part in found["codes"]["schemes"].values())
        + " |"
        for name, found in models.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    num_rows, others = whole["data"]["num_rows"], content["num_rows_others"]
    return f"""\
{labels[content["first"]]} against its teacher and the student that it was quantized from, on {num_rows:,} held-out
questions:

| | |
|---|---|
{numbers}

{shown}

Output error / effect of each layer alone (KL in 1/1000 nats), then of all layers:

| | {" | ".join(heads)} | all, KL | words changed, % | CKA, tapped, since before | bits used |
|---|{"---|" * len(heads)}---|---|---|---|
{chr(10).join(rows)}

{others:,} questions for all but the first; {whole["dtype"]} on {whole["hardware"]}, {versions},
commit {content["commit"]}; `python benchmarks/analyze_demo.py`.
"""


def readme() -> str:
    """README.md with the toy suite's table made from benchmarks/results."""
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    return _filled(text, {"toy": _toy_table()})


def _toy_table() -> str:
    """Models of the demo down, benchmarks across: the headline with its interval, in points."""
    from grace_vlm.evals.tasks.registry import TASKS

    with (RESULTS / "toy_suite.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        value, low, high = (100 * float(row[name]) for name in ("value", "low", "high"))
        found.setdefault(row["label"], {})[row["task"]] = f"{value:.1f} [{low:.1f}, {high:.1f}]"
    heads = ["", *(TASKS[task].about.title for task in tasks)]
    lines = [[label, *(cells.get(task, "") for task in tasks)] for label, cells in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)) + "\n"


def _plots() -> Any:
    """``benchmarks/plot_loss.py``."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import plot_loss

    return plot_loss


def main() -> None:
    """Write all."""
    (HERE / "training.md").write_text(training(), encoding="utf-8")
    (HERE / "scaling.md").write_text(scaling(), encoding="utf-8")
    (HERE / "performance.md").write_text(performance(), encoding="utf-8")
    (HERE / "numerics.md").write_text(numerics(), encoding="utf-8")
    (HERE / "kernels.md").write_text(kernels(), encoding="utf-8")
    (HERE / "engine.md").write_text(engine(), encoding="utf-8")
    (HERE / "evaluation.md").write_text(evaluation(), encoding="utf-8")
    (HERE / "analyze.md").write_text(analyze(), encoding="utf-8")
    for name, text in analyze_pictures().items():
        (HERE / "images" / name).write_text(text, encoding="utf-8")
    (HERE.parent / "README.md").write_text(readme(), encoding="utf-8")
    _plots().main([])
    (HERE / "recipes.md").write_text(recipes(), encoding="utf-8")
    (HERE / "cli.md").write_text(cli(), encoding="utf-8")


if __name__ == "__main__":
    main()
