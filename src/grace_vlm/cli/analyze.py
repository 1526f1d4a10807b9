"""``grace analyze``."""

from __future__ import annotations

from pathlib import Path

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table, say

HELP = """Say why a quantized model is as good as it is: numbers, pictures and one page, from rows of training.

Teacher entropy against error and the gate, CKA with the teacher, each layer's effect on the logits, the codes.
Example: grace analyze runs/demo/grace_w4 --teacher runs/demo/teacher --before runs/demo/student
 --data runs/demo/data/questions.jsonl --out runs/why"""


def analyze(
    model: str = typer.Argument(..., help="The student: model, run or packed folder of any layout, or hub id."),
    data: Path = typer.Option(..., "--data", help="Rows of training or of one question each, with their answers."),
    out: Path = typer.Option(..., "--out", help="Folder for analysis.json, the pictures and index.html."),
    teacher: str = typer.Option(None, "--teacher", help="Its teacher: entropy, gate and CKA."),
    before: str = typer.Option(None, "--before", help="The student before it was quantized: effects, CKA before."),
    root: Path = typer.Option(None, "--root", help="Folder that image paths start from; default: the file's."),
    limit: int = typer.Option(512, "--limit", help="Rows to look at, drawn by --seed; the binned R2 wants 2400."),
    seed: int = typer.Option(0, "--seed", help="Of the draw."),
    max_pixels: int = typer.Option(
        None, "--max-pixels", help="Area that larger pictures are shrunk to; default: 200704, as in training."
    ),
    linears: bool = typer.Option(
        False, "--linears", help="Also the effect of each linear alone; not of AWQ and training, which change more."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    from grace_vlm.evals.why.analysis import Analysis, write_analysis
    from grace_vlm.evals.why.page import write_pictures
    from grace_vlm.evals.why.rows import Sampled
    from grace_vlm.evals.why.summary import summary_lines

    sampled = Sampled(data, root, limit, seed, max_pixels)
    with ProgressBar("looking") as bar:
        result = Analysis(model, teacher, before, sampled, device, linears).run(bar.update)
    write_analysis(out, result)
    written = write_pictures(out, result)
    for sentence in result["left_out"]:
        say(sentence)
    if as_json:
        emit_json({"out": str(out), "page": str(written[-1]), **result})
        return
    print_table(("what", "value"), summary_lines(result))
    print(f"page: {written[-1]}")
