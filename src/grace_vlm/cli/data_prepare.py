"""``grace data prepare``."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from grace_vlm.cli.output import ProgressBar, emit_json, print_table, say

if TYPE_CHECKING:
    from grace_vlm.data.sources.conversations import PreparedRows, RowsReport

HELP = """Make a data set to train on: one of ours, or rows and pictures that you downloaded. Or one to evaluate on.

easy-vqa, scenes, mix (both) and toy (of the shipped bases) are made from an installed package and our generators.
sharegpt4v and llava take an annotation file and its pictures; hf takes a Hugging Face data set with LLaVA's columns.
world is a mix on things that have names: emoji, flags, charts, digits, easy-vqa, scenes, and toy-suite's kinds.
text is prose to measure perplexity on, and rows without pictures.
toy-suite is for evaluation: small stand-ins for seven benchmarks, in the layouts of the real ones.

Example: grace data prepare easy-vqa runs/data/easy-vqa

Example: grace data prepare sharegpt4v runs/sft --annotations sharegpt4v_mix665k.json --images data"""

_OPTIONS = {
    # source: (what it needs, what it may have)
    "sharegpt4v": (("--annotations", "--images"), ("--skip-missing",)),
    "llava": (("--annotations", "--images"), ("--skip-missing",)),
    "hf": (("--dataset",), ("--config", "--split", "--image-column", "--images", "--skip-missing")),
}
_SUITES = ("toy-suite",)
_MIXES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # made from packages: (what they need, what they may have)
    "world": (("--emoji", "--flags"), ("--rows", "--seed", "--workers")),
    "text": ((), ("--most-words", "--rows", "--seed")),
}
_GENERATED: tuple[tuple[str, ...], tuple[str, ...]] = ((), ("--seed",))
_WEB_DATA = "https://github.com/InternLM/InternLM-XComposer/blob/main/projects/ShareGPT4V/docs/Data.md (web data)"
_DOWNLOADS = {
    "coco/train2017": "http://images.cocodataset.org/zips/train2017.zip",
    "gqa/images": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    "llava/llava_pretrain/images": "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain (images.zip)",
    "ocr_vqa/images": "https://github.com/InternLM/InternLM-XComposer/blob/main/projects/ShareGPT4V/docs/Data.md",
    "sam/images": "https://ai.meta.com/datasets/segment-anything-downloads (000000 to 000050.tar)",
    "textvqa/train_images": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "vg/VG_100K": "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    "vg/VG_100K_2": "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
    **dict.fromkeys(
        ("share_textvqa/images", "web-celebrity/images", "web-landmark/images", "wikiart/images"), _WEB_DATA
    ),
}
"""Where ShareGPT4V's own page, projects/ShareGPT4V/docs/Data.md of InternLM-XComposer, takes its pictures from."""
_NOTES = {
    "num_left_out": "rows with a picture that is missing",
    "num_renamed_ids": "ids made unique",
    "num_numbered_ids": "rows without an id, which got their number",
    "num_system_turns": "system turns dropped",
    "num_outside": "rows whose image is no path below the images folder; grace data check names them",
    "num_copied": "rows that are no JSON object, copied as they are; grace data check names them",
    "num_not_copied": "rows that are no JSON object and no line of JSONL either, left out; the first is",
}


def prepare_data(
    source: str = typer.Argument(
        ..., help="easy-vqa, scenes, mix, toy, world, text, sharegpt4v, llava, hf, toy-suite."
    ),
    out: Path = typer.Argument(..., help="Folder to make: train.jsonl, manifest.json, pictures where they are made."),
    seed: int = typer.Option(None, "--seed", help="Of what is drawn: same seed, same bytes; default: 0."),
    annotations: Path = typer.Option(None, "--annotations", help="sharegpt4v, llava: the rows, JSON array or JSONL."),
    images: Path = typer.Option(None, "--images", help="sharegpt4v, llava, hf: folder that image paths start from."),
    skip_missing: bool = typer.Option(False, "--skip-missing", help="Leave out rows whose pictures are missing."),
    dataset: str = typer.Option(None, "--dataset", help="hf: id on the Hub, saved folder, Parquet file or folder."),
    config: str = typer.Option(None, "--config", help="hf: configuration, of a data set that has several."),
    emoji: Path = typer.Option(None, "--emoji", help="world: npm package emoji-datasource-google, .tgz or folder."),
    flags: Path = typer.Option(None, "--flags", help="world: npm package flag-icons, .tgz or folder."),
    num_rows: int = typer.Option(
        None, "--rows", help="world: rows to train on, about; default: 165000. text: of prose; default: 3000."
    ),
    most_words: int = typer.Option(None, "--most-words", help="text: of a paragraph of prose; default: 90."),
    workers: int = typer.Option(None, "--workers", help="world: processes that draw; default: the cores."),
    split: str = typer.Option(None, "--split", help="hf: default: train."),
    image_column: str = typer.Option(None, "--image-column", help="hf: default: image or images."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing folder."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on standard output."),
) -> None:
    given: dict[str, Any] = {
        "--seed": seed,
        "--annotations": annotations,
        "--images": images,
        "--skip-missing": skip_missing or None,
        "--dataset": dataset,
        "--config": config,
        "--split": split,
        "--image-column": image_column,
        "--emoji": emoji,
        "--flags": flags,
        "--rows": num_rows,
        "--most-words": most_words,
        "--workers": workers,
    }
    options = {name: value for name, value in given.items() if value is not None}
    _check_options(source, options)
    if source in _OPTIONS:
        _prepare_rows(source, out, options, overwrite, as_json)
    elif source == "world":
        _prepare_world(out, options, overwrite, as_json)
    elif source == "text":
        _prepare_text(out, options, overwrite, as_json)
    elif source in _SUITES:
        _prepare_suite(out, seed or 0, overwrite, as_json)
    else:
        _prepare_generated(source, out, seed or 0, overwrite, as_json)


def _check_options(source: str, options: dict[str, Any]) -> None:
    from grace_vlm.data.sources.prepare import SOURCES
    from grace_vlm.errors import ConfigError

    known = (*SOURCES, *_MIXES, *_OPTIONS, *_SUITES)
    if source not in known:
        raise ConfigError(f"unknown source {source!r}; choose one of {', '.join(known)}")
    needed, allowed = {**_OPTIONS, **_MIXES}.get(source, _GENERATED)
    for name in options:
        if name not in needed + allowed:
            raise ConfigError(f"{name} is no option of the source {source}; it has {', '.join(needed + allowed)}")
    missing = [name for name in needed if name not in options]
    if missing:
        raise ConfigError(f"the source {source} needs {' and '.join(needed)}; {' and '.join(missing)} not given")


def _prepare_generated(source: str, out: Path, seed: int, overwrite: bool, as_json: bool) -> None:
    from grace_vlm.data.sources.prepare import prepare

    say(f"preparing {source}")
    info = prepare(source, out, seed=seed, overwrite=overwrite)
    if as_json:
        emit_json({**asdict(info), "out": str(info.out)})
        return
    rows = [(split, str(info.num_images[split]), str(info.num_rows[split])) for split in info.num_rows]
    print_table(("split", "pictures", "questions"), rows)


def _prepare_world(out: Path, options: dict[str, Any], overwrite: bool, as_json: bool) -> None:
    from grace_vlm.data.sources.world.mix import prepare_world
    from grace_vlm.data.sources.world.plan import DEFAULT_ROWS
    from grace_vlm.evals.toy.layout import import_pyarrow
    from grace_vlm.evals.toy.rows import SuiteSource

    import_pyarrow()
    seed = options.get("--seed", 0)
    with ProgressBar("preparing") as bar:
        info = prepare_world(
            out,
            emoji_package=options["--emoji"],
            flags_package=options["--flags"],
            suite=(partial(SuiteSource, seed), SuiteSource.rows_per_unit),
            num_rows=options.get("--rows", DEFAULT_ROWS),
            seed=seed,
            num_workers=options.get("--workers"),
            overwrite=overwrite,
            progress=bar.update,
        )
    if as_json:
        emit_json({"out": str(info.out), **info.manifest})
        return
    train, test = info.manifest["categories"]["train"], info.manifest["categories"]["test"]
    rows = [(name, str(train.get(name, 0)), str(test.get(name, 0))) for name in sorted({*train, *test})]
    rows.append(("all", str(info.num_rows["train"]), str(info.num_rows["test"])))
    print_table(("part", "rows to train on", "rows of the test"), rows)


def _prepare_text(out: Path, options: dict[str, Any], overwrite: bool, as_json: bool) -> None:
    from grace_vlm.data.sources.text import MAX_WORDS, NUM_CONTINUATIONS, prepare_text

    say("preparing text")
    info = prepare_text(
        out,
        seed=options.get("--seed", 0),
        num_continuations=options.get("--rows", NUM_CONTINUATIONS),
        most_words=options.get("--most-words", MAX_WORDS),
        overwrite=overwrite,
    )
    if as_json:
        emit_json({"out": str(info.out), **info.manifest})
        return
    rows = [(f"{name}.jsonl", f"{number} rows") for name, number in info.manifest["num_rows"].items()]
    print_table(("file", "size"), [("heldout.txt", f"{info.manifest['num_heldout_words']} words"), *rows])


def _prepare_suite(out: Path, seed: int, overwrite: bool, as_json: bool) -> None:
    from grace_vlm.evals.toy.suite import read_manifest, write_toy_suite

    with ProgressBar("preparing") as bar:
        folders = write_toy_suite(out, seed, overwrite=overwrite, progress=bar.update)
    manifest = read_manifest(out)
    if as_json:
        emit_json({"out": str(out), **manifest})
        return
    counts = {name: manifest["benchmarks"][name]["counts"] for name in folders}
    rows = [(name, str(one["rows"]), str(one["pictures"])) for name, one in counts.items()]
    print_table(("benchmark", "rows", "pictures"), rows)


def _prepare_rows(source: str, out: Path, options: dict[str, Any], overwrite: bool, as_json: bool) -> None:
    from grace_vlm.data.sources.conversations import PicturesMissing, prepare_conversations
    from grace_vlm.data.sources.hf import prepare_hf

    named = {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
    try:
        with ProgressBar("preparing") as bar:
            if source == "hf":
                info = prepare_hf(out, overwrite=overwrite, progress=bar.update, **named)
            else:
                info = prepare_conversations(source, out, overwrite=overwrite, progress=bar.update, **named)
    except PicturesMissing as error:
        if as_json:
            emit_json({"source": source, **asdict(error.report)})
        else:
            _print_report(error.report)
        raise
    command = _train_command(info)
    if as_json:
        document = {"out": str(info.out), "source": source, "rows_sha256": info.rows_sha256, "train_command": command}
        emit_json({**document, **asdict(info.report)})
        return
    _print_report(info.report)
    print(command)


def _train_command(info: PreparedRows) -> str:
    root = [] if info.root is None else [f"data.root={info.root}"]
    return shlex.join(["grace", "train", "RECIPE", f"data.train={info.out / 'train.jsonl'}", *root])


def _print_report(report: RowsReport) -> None:
    found = sorted(report.collections.items())
    rows = [(name, str(one.num_rows), str(one.num_present), str(one.num_missing)) for name, one in found]
    num_present, num_missing = sum(one.num_present for _, one in found), sum(one.num_missing for _, one in found)
    rows.append(("text only", str(report.num_text_rows), "0", "0"))
    rows.append(("all", str(report.num_rows), str(num_present), str(num_missing)))
    print_table(("sub-collection", "rows", "pictures present", "pictures missing"), rows)
    for name, words in _NOTES.items():
        if number := getattr(report, name):
            print(f"{number} {words} {report.first_not_copied if name == 'num_not_copied' else ''}".rstrip())
    for name, one in found:
        if one.num_missing and name in _DOWNLOADS:
            print(f"{name}: {_DOWNLOADS[name]}")
