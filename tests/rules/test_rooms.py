"""Imports go down only; nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from house import PACKAGE, TREES, dotted, imported

FLOORS = (
    ("errors",),
    ("quant",),
    ("kernels", "media"),
    ("models", "losses", "data", "checkpoint"),
    ("engine", "formats"),
    ("server", "evals", "train", "ptq"),
    ("cli",),
)
"""design.md, from the bottom up."""
ALONGSIDE = {("data", "models"), ("engine", "formats")}
"""Imports between rooms of one floor, (from, to): data needs models' adapter protocol, the
engine runs what formats read; neither the other way."""
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
HEAVY = ("torch", "transformers", "numpy", "PIL", "accelerate", "pydantic", "safetensors", "tokenizers")


def room_of(module: str) -> str:
    """``grace_vlm.quant.affine.bake`` and ``quant/affine.py`` are of the room ``quant``."""
    return module.removeprefix("grace_vlm.").replace("/", ".").split(".")[0]


def test_every_room_is_on_the_plan() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms <= set(FLOOR_OF), f"rooms that design.md does not know: {rooms - set(FLOOR_OF)}"
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "errors.py"}


def test_imports_go_down_only() -> None:
    wrong = []
    for name, tree in TREES.items():
        own = room_of(name.removesuffix(".py"))
        if own == "__init__":
            continue
        for module, line in imported(tree):
            if not module.startswith("grace_vlm"):
                continue
            other = room_of(module)
            if other in (own, "__version__") or (own, other) in ALONGSIDE:
                continue
            if other not in FLOOR_OF or FLOOR_OF[other] >= FLOOR_OF[own]:
                wrong.append(f"{name}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_rule_would_see_an_import_that_goes_up() -> None:
    tree = ast.parse("def f():\n    from grace_vlm.train.config import Recipe\n    import grace_vlm.data.rows\n")
    assert [module for module, _ in imported(tree)] == ["grace_vlm.train.config.Recipe", "grace_vlm.data.rows"]
    assert FLOOR_OF[room_of("grace_vlm.train.config.Recipe")] > FLOOR_OF["quant"]
    assert room_of("grace_vlm.data.rows") == "data"


def test_the_package_opens_every_room_on_first_use_only() -> None:
    assert not [m for m, _ in imported(TREES["__init__.py"]) if m.startswith("grace_vlm")]


def test_only_media_imports_pillow() -> None:
    wrong = [
        f"{name}:{line}"
        for name, tree in TREES.items()
        for module, line in imported(tree)
        if module.split(".")[0] == "PIL" and not name.startswith("media/")
    ]
    assert not wrong


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


REPORT = f"print([m for m in {HEAVY!r} if m in sys.modules])"


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert run_python(f"import sys; import grace_vlm; {REPORT}").strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "sys.argv = ['grace', '--help']\n"
        "from grace_vlm.cli.main import main\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n    main()\n"
        "assert 'Usage' in out.getvalue(), out.getvalue()\n"
    )
    assert run_python(code + REPORT).strip() == "[]"


def test_importing_every_module_does_no_work() -> None:
    """No CUDA call, no random state, no environment change, no file, no output."""
    modules = [f"grace_vlm.{name.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}" for name in TREES]
    modules = [module for module in modules if module != "grace_vlm.__init__"]
    code = (
        "import os, sys, random, importlib, numpy, torch\n"
        "def states(): return (random.getstate(), torch.get_rng_state().tolist(), "
        "numpy.random.get_state()[1].tolist(), torch.get_num_threads(), torch.get_default_dtype())\n"
        "before, files = states(), sorted(os.listdir('.'))\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        "assert states() == before, 'a global state changed'\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert sorted(os.listdir('.')) == files\n"
        "assert all(m not in sys.modules for m in ('transformers.models.qwen3_vl.modeling_qwen3_vl',))\n"
    )
    assert run_python(code) == ""


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_call_that_seeds_or_asks_the_machine_at_import(name: str) -> None:
    forbidden = (
        "torch.cuda.",
        "torch.manual_seed",
        "torch.set_",
        "random.seed",
        "numpy.random.seed",
        "os.environ",
        "os.getenv",
    )
    wrong = []

    def outside_functions(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Call | ast.Attribute | ast.Subscript):
                target = child.func if isinstance(child, ast.Call) else child
                text = dotted(target) if isinstance(target, ast.expr) else ""
                if text.startswith(forbidden):
                    wrong.append(f"{name}:{child.lineno} {text}")
            outside_functions(child)

    outside_functions(TREES[name])
    assert not wrong
