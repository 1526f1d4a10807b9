"""The CPU's kernels under sanitizers, against FP64, in each of their three forms (fuzz_cpu.c)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from grace_vlm.kernels.cpu import TEXTS, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
FORMS = {
    "of this processor": ("-march=native",),
    "256 bits with VNNI": ("-march=native", "-DNARROW"),
    "AVX2": ("-march=x86-64-v3",),
}
"""Where the processor has no VNNI, the second is the third."""


def fuzz(folder: Path, flags: tuple[str, ...], sanitizers: str, cases: int) -> None:
    """Compile and run; a wrong output, a byte beside the memory, a data race or a leak fails."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    program, text = folder / "fuzz", Path(__file__).with_name("fuzz_cpu.c")
    command = [str(compiler), "-O1", "-g", *flags, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", str(text), *map(str, TEXTS), "-lm"]
    compiled = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if compiled.returncode and any(name in compiled.stderr for name in ("-lasan", "-lubsan", "-ltsan")):
        pytest.skip("this compiler has no sanitizers")
    assert not compiled.returncode, compiled.stderr
    ran = subprocess.run([str(program), str(cases), "1"], capture_output=True, text=True, timeout=500)
    assert ran.stdout == f"{cases} cases\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("form", FORMS)
def test_random_layers(form: str, tmp_path: Path) -> None:
    fuzz(tmp_path, FORMS[form], "address,undefined", 300)


@pytest.mark.soak
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sanitizers", "cases"), [("address,undefined", 10_000), ("thread", 1_500)])
def test_many_random_layers(form: str, sanitizers: str, cases: int, tmp_path: Path) -> None:
    fuzz(tmp_path, FORMS[form], sanitizers, cases)
