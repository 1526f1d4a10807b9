"""Sizes, names, docstrings, and what is written nowhere."""

from __future__ import annotations

import ast
import re
import tokenize
from io import StringIO
from pathlib import Path

import pytest
from house import PACKAGE, SOURCES, TREES, Function, code_lines, dotted, functions, imported, length

MAX_FILE_LINES, MAX_FUNCTION_LINES, P90_FUNCTION_LINES = 380, 120, 45
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "core", "base"}
DANGEROUS = {
    # file: what it may say, and why
    "formats/sidecar.py": ({"torch.load", "pickle"}, "the official sidecar is a pickle (design.md 5)"),
}
DOCUMENTED_ROOMS = ("quant/", "losses/", "checkpoint/")


def test_no_file_is_called_utils() -> None:
    wrong = [
        name for name in SOURCES if Path(name).stem in FORBIDDEN_STEMS or set(Path(name).parts[:-1]) & FORBIDDEN_STEMS
    ]
    assert not wrong


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_are_short(name: str) -> None:
    assert code_lines(SOURCES[name]) <= MAX_FILE_LINES


def test_code_lines_leave_out_blanks_and_comments_and_count_docstrings() -> None:
    assert code_lines('"""Head\n\nline."""\n# no\n\nx = (1,  # yes\n\n     2)\n') == 4


def all_functions() -> list[tuple[str, Function]]:
    return [(name, function) for name, tree in TREES.items() for function in functions(tree)]


def test_functions_are_short() -> None:
    found = [
        (length(function), f"{name}:{function.name}") for name, function in all_functions() if "kernels/" not in name
    ]
    too_long = [entry for entry in found if entry[0] > MAX_FUNCTION_LINES]
    assert not too_long
    lengths = sorted(number for number, _ in found)
    assert lengths[int(0.9 * len(lengths))] <= P90_FUNCTION_LINES


def calls(tree: ast.AST) -> set[str]:
    return {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("name", sorted(TREES))
def test_nothing_from_a_stranger_is_ever_executed(name: str) -> None:
    tree = TREES[name]
    found = calls(tree) & {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system"}
    roots = {module.split(".")[0] for module, _ in imported(tree)}
    found |= roots & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    allowed, _reason = DANGEROUS.get(name, (set(), ""))
    assert not found - allowed


def test_the_allow_list_has_no_dead_entry() -> None:
    assert set(DANGEROUS) <= set(SOURCES)


@pytest.mark.parametrize("name", sorted(TREES))
def test_trust_remote_code_is_never_given_and_torch_load_is_weights_only(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        assert "trust_remote_code" not in given, f"{name}:{node.lineno}"
        if dotted(node.func) == "torch.load":
            flag = given.get("weights_only")
            assert isinstance(flag, ast.Constant), f"{name}:{node.lineno}"
            assert flag.value is True, f"{name}:{node.lineno}"
        if dotted(node.func) in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            pytest.fail(f"{name}:{node.lineno}: yaml.safe_load is the one that is used")
        shell = given.get("shell")
        assert not (isinstance(shell, ast.Constant) and shell.value), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", sorted(TREES))
def test_everything_is_caught_only_at_the_top(name: str) -> None:
    if name == "cli/main.py" or name.startswith("server/"):
        return
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno}: bare except"
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            last = node.body[-1]
            if isinstance(last, ast.Raise) and last.exc is None:
                continue  # cleans up and lets everything through
            assert not {dotted(kind) for kind in kinds} & {"Exception", "BaseException"}, f"{name}:{node.lineno}"
        if isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            assert not {dotted(arg) for arg in node.args} & {"Exception", "BaseException"}, f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_is_left_for_later(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            assert dotted(raised) != "NotImplementedError", f"{name}:{node.lineno}"
    for token in tokenize.generate_tokens(StringIO(SOURCES[name]).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string), f"{name}:{token.start[0]}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_print_is_the_command_lines_alone(name: str) -> None:
    if not name.startswith("cli/"):
        assert "print" not in calls(TREES[name])


@pytest.mark.parametrize("name", [name for name in sorted(TREES) if name.startswith(DOCUMENTED_ROOMS)])
def test_public_things_have_a_docstring(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name} has no head"
    public = [n for n in tree.body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")]
    missing = [f"{name}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
    assert not missing


def test_user_errors_have_different_exit_codes() -> None:
    from grace_vlm import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GraceError)]
    leaves = [kind for kind in kinds if kind is not errors.GraceError]
    assert {kind.__name__ for kind in leaves} == {
        "ConfigError",
        "DataError",
        "FormatError",
        "CheckpointError",
        "NonFiniteError",
        "RequestError",
        "OtherProcessError",
        "StoppedError",
    }
    codes = [kind.exit_code for kind in leaves]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes
    raised = {
        dotted(node.exc.func)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    assert "GraceError" not in raised


def test_names_that_are_exported_exist() -> None:
    import grace_vlm

    for name in grace_vlm.__all__:
        assert getattr(grace_vlm, name) is not None
    with pytest.raises(AttributeError, match="module 'grace_vlm' has no attribute 'nothing'"):
        _ = grace_vlm.nothing
    assert (PACKAGE / "py.typed").is_file()
