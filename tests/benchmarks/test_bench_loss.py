"""bench_loss.py, plot_loss.py and ``grace bench`` on a CPU at tiny sizes."""

from __future__ import annotations

import csv
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_loss  # noqa: E402
import plot_loss  # noqa: E402
import record  # noqa: E402

from grace_vlm.cli import bench  # noqa: E402
from grace_vlm.cli.main import main as grace_main  # noqa: E402

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--vocabulary", "50", "--student-width", "8", "--teacher-width", "16", "--iterations", "2")
HEADER = "bench,case,impl,metric,p20,p50,p80,unit,device,driver,torch,triton,commit,date"
SHAPE = bench_loss.Shape(70, 50, 8, 16)


@pytest.fixture
def grace(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command; returns (exit code, standard output, standard error), a script's included."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["grace", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            grace_main()
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def keys(path: Path) -> list[tuple[str, str, str]]:
    with path.open(newline="") as file:
        return [(row["case"], row["impl"], row["metric"]) for row in csv.DictReader(file)]


# What is measured


def test_inputs_make_logits_of_the_size_that_is_said_and_the_same_every_time() -> None:
    inputs = bench_loss.make_inputs(bench_loss.Shape(200, 1000, 64, 128), CPU)
    z, y = inputs.student_hidden @ inputs.student_head.T, inputs.teacher_hidden @ inputs.teacher_head.T
    assert float(z.std()) == pytest.approx(2.0, rel=0.1)
    assert float(y.std()) == pytest.approx(2.0, rel=0.1)
    assert float(torch.corrcoef(torch.stack([z.flatten(), y.flatten()]))[0, 1]) == pytest.approx(0.5**0.5, abs=0.05)
    again = bench_loss.make_inputs(bench_loss.Shape(200, 1000, 64, 128), CPU)
    assert torch.equal(again.teacher_head, inputs.teacher_head)
    assert torch.equal(again.targets, inputs.targets)


@pytest.mark.parametrize("impl", ["ours", "ours_autograd"])
@pytest.mark.parametrize("metric", ["ms", "ms_gate_given"])
def test_ours_computes_what_the_official_code_computes(impl: str, metric: str) -> None:
    inputs = bench_loss.make_inputs(SHAPE, CPU)
    expected: Any = bench_loss.IMPLS["official"](inputs)["ms"]()
    found: Any = bench_loss.IMPLS[impl](inputs)[metric]()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_call_leaves_nothing_in_the_inputs() -> None:
    inputs = bench_loss.make_inputs(SHAPE, CPU)
    for build in (bench_loss.IMPLS["official"], bench_loss.IMPLS["ours"]):
        first, second = (build(inputs)["ms"]() for _ in range(2))
        assert isinstance(first, tuple)
        assert isinstance(second, tuple)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not inputs.student_head.requires_grad
    assert inputs.student_head.grad is None


def test_liger_is_called_as_its_own_benchmark_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: settings, order of arguments, gradients of the student alone."""
    given: dict[str, Any] = {}

    class StandIn:
        def __init__(self, **settings: Any) -> None:
            given.update(settings)

        def __call__(self, student: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any) -> torch.Tensor:
            given["shapes"] = [tuple(x.shape) for x in (student, head, teacher, teacher_head, labels)]
            assert not teacher.requires_grad
            return (student @ head.T).sum() + (teacher @ teacher_head.T).sum()

    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.chunked_loss")
    module.LigerFusedLinearJSDLoss = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", module)
    loss, d_hidden, d_head = bench_loss.liger_calls(bench_loss.make_inputs(SHAPE, CPU))["ms"]()  # type: ignore[misc]
    assert (d_hidden.shape, d_head.shape, loss.requires_grad) == ((70, 8), (50, 8), False)
    assert given == {
        "weight_hard_loss": 0.5,
        "weight_soft_loss": 0.5,
        "beta": 0.5,
        "compiled": False,
        "chunk_size": 1024,
        "shapes": [(70, 8), (50, 8), (70, 16), (50, 16), (70,)],
    }


@pytest.mark.parametrize(
    ("shape", "scaling", "name"),
    [
        (bench_loss.Shape(1024), False, "n1024"),
        (bench_loss.Shape(1024), True, "n1024_v151936"),
        (bench_loss.Shape(8192, 32_768), False, "n8192_v32768"),
        (bench_loss.Shape(4, 50, 8, 16), False, "n4_v50_d8x16"),
    ],
)
def test_a_case_says_what_is_not_the_published_pair(shape: bench_loss.Shape, scaling: bool, name: str) -> None:
    assert shape.name(scaling) == name


def test_the_cases_are_those_of_the_facts() -> None:
    args, shapes = bench_loss.settings(["--device", "cpu", "--out", "nowhere.csv"])
    assert [shape.name() for shape in shapes] == ["n1024", "n2048", "n4096", "n8192"]
    assert args.iterations == 20
    args, shapes = bench_loss.settings(["--device", "cpu", "--scaling", "--out", "nowhere.csv"])
    assert len(shapes) == 21
    assert {shape.num_tokens for shape in shapes} == {1024 << k for k in range(7)}
    assert {shape.vocabulary for shape in shapes} == {32_768, 151_936, 262_144}
    assert "ours_autograd" not in args.impls


# A run


def test_a_tiny_run_through_the_command(tmp_path: Path, grace: Any) -> None:
    out = tmp_path / "loss.csv"
    code, said, err = grace("bench", "loss", *TINY, "--cases", "n8,n3", "--impls", "official,ours", "--out", out)
    assert (code, said) == (0, "")
    assert [line.split(":")[0] for line in err.splitlines()] == ["n3_v50_d8x16", "n8_v50_d8x16", f"wrote {out}"]
    assert out.read_text().splitlines()[0] == HEADER
    metrics = [("official", "ms"), ("ours", "ms"), ("ours", "ms_gate_given")]
    assert keys(out) == [(f"n{n}_v50_d8x16", *pair) for n in (3, 8) for pair in metrics]
    rows = record.read_rows(out)
    assert {row["bench"] for row in rows} == {"loss"}
    assert all(0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)


def test_a_second_run_replaces_its_rows_and_keeps_the_others(tmp_path: Path) -> None:
    out = tmp_path / "loss.csv"
    common = (*TINY, "--out", str(out), "--impls", "official")
    assert bench_loss.main([*common, "--cases", "n3,n8"]) == 0
    rows = record.read_rows(out)
    record.write_rows(out, [{**row, "p50": "-1"} for row in rows])
    assert bench_loss.main([*common, "--cases", "n8"]) == 0
    medians = {row["case"]: float(row["p50"]) for row in record.read_rows(out)}
    assert list(medians) == ["n3_v50_d8x16", "n8_v50_d8x16"]
    assert medians["n3_v50_d8x16"] == -1
    assert medians["n8_v50_d8x16"] > 0


def test_scaling_has_its_own_name_and_times_the_whole_only(tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    assert bench_loss.main([*TINY, "--scaling", "--cases", "n4", "--impls", "ours", "--out", str(out)]) == 0
    assert keys(out) == [("n4_v50_d8x16", "ours", "ms")]
    assert record.read_rows(out)[0]["bench"] == "loss_scaling"


def test_what_does_not_fit_or_fails_is_said_and_has_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_big() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 37 GiB")

    def broken() -> None:
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setitem(bench_loss.IMPLS, "official", lambda _: {"ms": too_big})
    monkeypatch.setitem(bench_loss.IMPLS, "liger", lambda _: {"ms": broken})
    monkeypatch.delitem(bench_loss.MODULES, "liger")
    out, common = tmp_path / "x.csv", [*TINY, "--cases", "n4"]
    assert bench_loss.main([*common, "--impls", "official,liger,ours", "--out", str(out)]) == 0
    assert {impl for _, impl, _ in keys(out)} == {"ours"}
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["n4_v50_d8x16: official does not fit in memory", "n4_v50_d8x16: liger failed: no compiler"]
    assert lines[2].startswith("n4_v50_d8x16: ours ")
    with pytest.raises(RuntimeError, match="no compiler"):
        bench_loss.main([*common, "--impls", "ours", "--require", "liger", "--out", str(out)])


@pytest.mark.parametrize("event", ["nothing", "retry", "out of memory"])
def test_what_does_not_fit_side_by_side_is_timed_alone(
    event: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU that is played here: the allocator gave memory back, or had none, while calls took turns."""
    seen: list[tuple[str, int, int]] = []

    def play(calls: Any, device: Any, iterations: int, warmup: int) -> dict[str, list[float]]:
        seen.append(("".join(calls), iterations, warmup))
        if event == "out of memory" and len(seen) == 1:
            raise torch.OutOfMemoryError
        return {name: [float(len(seen))] for name in calls}

    monkeypatch.setattr(bench_loss, "time_interleaved", play)
    monkeypatch.setattr(bench_loss, "release", lambda _: None)
    retries = (len(seen) for _ in iter(int, 1)) if event == "retry" else iter([0, 0])
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"num_alloc_retries": next(retries)})
    calls = {"a": lambda: None, "b": lambda: None}
    gpu: Any = types.SimpleNamespace(type="cuda")
    samples = bench_loss.timed(calls, gpu, 20, "n4")
    together, apart = [("ab", 0, 3), ("ab", 20, 0)], [("a", 20, 3), ("b", 20, 3)]
    expected = {"nothing": together, "retry": together + apart, "out of memory": together[:1] + apart}
    assert seen == expected[event]
    assert samples == ({"a": [2.0], "b": [2.0]} if event == "nothing" else {"a": [len(seen) - 1.0], "b": [len(seen)]})
    line = "n4: the implementations do not fit in memory side by side: timed one after the other\n"
    assert capsys.readouterr().err == ("" if event == "nothing" else line)


def test_nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def too_big() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(bench_loss.IMPLS, "official", lambda _: {"ms": too_big})
    args = [*TINY, "--cases", "n4", "--impls", "official", "--out", str(tmp_path / "x.csv")]
    assert bench_loss.main(args) == 0
    assert capsys.readouterr().err == (
        "n4_v50_d8x16: official does not fit in memory\nn4_v50_d8x16: nothing ran\nno rows\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_peer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench_loss.MODULES, "liger", "a_package_that_nobody_has")
    args = [*TINY, "--cases", "n4", "--impls", "official,liger", "--out", str(tmp_path / "x.csv")]
    assert bench_loss.main(args) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "liger: a_package_that_nobody_has is not installed, so it has no rows"
    assert {impl for _, impl, _ in keys(tmp_path / "x.csv")} == {"official"}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--cases", "1024"), "--cases has '1024'; expected nNUMBER, for example n1024"),
        (("--cases", "n0"), "--cases has 'n0'; expected nNUMBER, for example n1024"),
        (("--vocabulary", "x"), "--vocabulary has 'x'; expected NUMBER, for example 151936"),
        (
            ("--impls", "ours,theirs"),
            "--impls theirs is no implementation; there are official, liger, ours, ours_autograd",
        ),
        (("--iterations", "0"), "--iterations is 0; expected at least 1"),
        (("--student-width", "0"), "--student-width and --teacher-width must be at least 1"),
        (("--require", "liger"), "--require liger: a_package_that_nobody_has is not installed"),
        (("--impls", "liger"), "none of the implementations asked for is installed"),
        (("--fast",), "unrecognized arguments: --fast"),
    ],
)
def test_errors_of_a_user_are_one_line(
    args: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(bench_loss.MODULES, "liger", "a_package_that_nobody_has")
    with pytest.raises(SystemExit) as stop:
        bench_loss.main(["--device", "cpu", "--out", str(tmp_path / "x.csv"), *args])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_loss.main(["--device", "cuda"])
    line = "error: --device cuda was asked for and no GPU is usable; use --device cpu\n"
    assert capsys.readouterr().err == line


def test_a_csv_of_another_schema_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.csv"
    out.write_text("case,seconds\n")
    with pytest.raises(SystemExit):
        bench_loss.main([*TINY, "--cases", "n4", "--out", str(out)])
    assert capsys.readouterr().err == f"error: {out} has other columns than {HEADER}; name another file\n"
    assert out.read_text() == "case,seconds\n"


def test_it_runs_where_only_torch_is_installed(tmp_path: Path) -> None:
    """The GPU machine has no pydantic, no Typer, no Transformers."""
    missing = ("pydantic", "typer", "click", "rich", "transformers", "accelerate", "safetensors", "PIL", "yaml",
               "jinja2", "markupsafe", "tokenizers", "torchvision")  # fmt: skip
    args = [*TINY, "--cases", "n4", "--impls", "official,ours", "--out", str(tmp_path / "x.csv")]
    code = (
        f"import sys, runpy\nfor name in {missing!r}: sys.modules[name] = None\n"
        f"sys.path[:0] = [{str(ROOT / 'benchmarks')!r}, {str(ROOT / 'src')!r}]\n"
        f"sys.argv = ['bench_loss.py', *{args!r}]\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'bench_loss.py')!r}, run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert len(keys(tmp_path / "x.csv")) == 3


# grace bench


def test_the_command_lists_the_scripts(grace: Any) -> None:
    code, out, err = grace("bench")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines()]
    assert names == sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
    line = next(line for line in out.splitlines() if line.startswith("loss "))
    assert line.endswith("time and memory of ours, the official code's and Liger's.")


def test_help_behind_the_name_is_the_scripts(grace: Any) -> None:
    code, out, _ = grace("bench", "loss", "--help")
    assert code == 0
    assert out.startswith("usage: bench_loss.py")
    code, out, _ = grace("bench", "--help")
    # What stands before "grace" is how the process was started, here pytest.
    assert code == 0
    assert out.splitlines()[0].strip().endswith("grace bench [OPTIONS] [name]")


def scripts(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"bench_{name}.py").write_text(text)
    monkeypatch.setattr(bench, "scripts_folder", lambda: folder)


def test_arguments_and_exit_code_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace: Any) -> None:
    scripts(tmp_path / "b", monkeypatch, echo='"""Says it.\n\nMore."""\nimport sys\nprint(sys.argv[1:])\nsys.exit(7)\n')
    assert grace("bench") == (0, "echo  Says it.\n", "")
    assert grace("bench", "echo", "--out", "x", "-v", "y", "--help") == (7, "['--out', 'x', '-v', 'y', '--help']\n", "")


def test_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace: Any) -> None:
    scripts(tmp_path / "b", monkeypatch, loss="", pack="")
    assert grace("bench", "los") == (2, "", "error: there is no benchmark 'los'; there are loss, pack\n")
    assert grace("bench", "--los") == (2, "", "error: No such option: --los; see grace bench --help\n")


@pytest.mark.parametrize(("args", "name"), [(("loss", "--out", "x"), "loss"), ((), "NAME")])
def test_an_installed_package_has_no_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace: Any, args: tuple[str, ...], name: str
) -> None:
    monkeypatch.setattr(bench, "scripts_folder", lambda: tmp_path / "lib" / "benchmarks")
    line = (
        f"error: benchmarks/bench_{name}.py is not here: the package was imported from {ROOT / 'src' / 'grace_vlm'}, "
        "and benchmarks are no part of it; run it in a clone of the repository\n"
    )
    assert grace("bench", *args) == (2, "", line)


# plot_loss


def made_up(bench_name: str, sizes: dict[str, float], impls: dict[str, float]) -> list[record.Row]:
    place = dict(zip(record.COLUMNS[8:], ("NVIDIA <H100>", "580", "2.11.0", "3.6.0", "abc", "2026-11-25"), strict=True))
    rows = []
    for case, size in sizes.items():
        for impl, factor in impls.items():
            values = [("ms", size * factor), ("extra_gb", factor)]
            values += [("ms_gate_given", size * factor / 2)] if impl.startswith("ours") else []
            rows += [record.row_of(bench_name, case, impl, m, [v], bench_loss.UNITS[m], place) for m, v in values]
    return rows


@pytest.fixture
def measured(tmp_path: Path) -> list[str]:
    """Two made-up files, as ``main`` of plot_loss takes them."""
    loss, scaling = tmp_path / "loss.csv", tmp_path / "loss_scaling.csv"
    record.write_rows(loss, made_up("loss", {"n1024": 10, "n2048": 20}, {"official": 4, "ours": 1, "theirs": 2}))
    sizes = {"n1024_v32768": 2.5, "n2048_v32768": 5, "n65536_v32768": 160, "n2048_v151936": 99}
    record.write_rows(scaling, made_up("loss_scaling", sizes, {"official": 3, "ours": 1}))
    return [str(loss), str(scaling)]


def test_plots_are_xml_and_the_same_bytes_every_time(measured: list[str], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert plot_loss.main([*measured, "--out", str(tmp_path / folder)]) == 0
    svg = "{http://www.w3.org/2000/svg}"
    for name in ("loss_time.svg", "loss_memory.svg"):
        text = (tmp_path / "a" / name).read_bytes()
        assert text == (tmp_path / "b" / name).read_bytes()
        root = ET.fromstring(text)
        assert root.tag == f"{svg}svg"
        assert len(list(root.iter(f"{svg}polyline"))) == 5
        texts = [element.text for element in root.iter(f"{svg}text")]
        assert {"official GRACE", "ours", "theirs", "V = 32,768", "V = 151,936", "1k", "64k"} <= set(texts)
        style = next(root.iter(f"{svg}style")).text
        assert style is not None
        assert "prefers-color-scheme: dark" in style
        assert "var(" not in style


def test_of_a_point_that_stands_twice_the_first_counts(measured: list[str]) -> None:
    rows = [row for path in measured for row in record.read_rows(Path(path))]
    assert plot_loss.lines_of(rows, "ms") == [
        plot_loss.Line("official", 32_768, ((1024, 7.5), (2048, 15.0), (65536, 480.0))),
        plot_loss.Line("official", 151_936, ((1024, 40.0), (2048, 80.0))),
        plot_loss.Line("ours", 32_768, ((1024, 2.5), (2048, 5.0), (65536, 160.0))),
        plot_loss.Line("ours", 151_936, ((1024, 10.0), (2048, 20.0))),
        plot_loss.Line("theirs", 151_936, ((1024, 20.0), (2048, 40.0))),
    ]


def test_the_table_word_for_word(measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_loss.main([*measured, "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == (
        "| supervised tokens | official GRACE, ms | ours, ms | theirs, ms | ours, gate given, ms | official GRACE, GB "
        "| ours, GB | theirs, GB | official / ours, time | memory |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
        "| 1,024 | 40.0 | 10.0 | 20.0 | 5.00 | 4.00 | 1.00 | 2.00 | 4.0x | 4.0x |\n"
        "| 2,048 | 80.0 | 20.0 | 40.0 | 10.0 | 4.00 | 1.00 | 2.00 | 4.0x | 4.0x |\n"
        "\n"
        "NVIDIA <H100>, torch 2.11.0, Triton 3.6.0, commit abc, 2026-11-25\n"
    )


def test_what_an_implementation_lacks_is_a_dash() -> None:
    rows = [row for row in made_up("loss", {"n1024": 10}, {"official": 4, "ours": 1}) if row["metric"] == "ms"]
    line = plot_loss.table(rows).splitlines()[2]
    assert line == "| 1,024 | 40.0 | 10.0 | - | - | 4.0x | - |"


def test_rows_of_two_devices_are_not_drawn_together(
    measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [{**row, "device": "NVIDIA H200"} for row in record.read_rows(Path(measured[1]))]
    record.write_rows(Path(measured[1]), other)
    assert plot_loss.main([*measured, "--out", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err == "error: rows of NVIDIA <H100>, NVIDIA H200; name files of one device\n"
    assert not (tmp_path / "a").exists()
