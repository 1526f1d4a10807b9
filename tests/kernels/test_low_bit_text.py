"""The CUDA text itself on a CPU: a thread a lane, tensor cores as the PTX ISA draws them (emulated/emulate.h); and
NVRTC's word that it compiles."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from low_bit_cases import bound, error, exact, inputs_of, weight

from grace_vlm.errors import ConfigError
from grace_vlm.kernels import low_bit_linear as module
from grace_vlm.kernels.decoder_rows import gated_reference
from grace_vlm.kernels.fragments import PackedLinear, pack_linear
from grace_vlm.kernels.low_bit_cuda import (
    Setup,
    TileSetup,
    defines_of,
    plain_defines_of,
    plain_setup_of,
    setup_of,
    tile_defines_of,
    tile_setup_of,
    tile_setups,
)
from grace_vlm.kernels.low_bit_linear import Norm, interleaved, low_bit_linear
from grace_vlm.kernels.nvrtc import compile_text, has_nvrtc
from grace_vlm.quant.scheme import QuantizedTensor

TEXT = Path(module.__file__).with_name("low_bit_linear.cu")
EMULATED = Path(__file__).parent / "emulated"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")
NUMBERS = itertools.count()


def compiled(tmp_path: Path, file: str, defines: dict[str, int]) -> ctypes.CDLL:
    """A text for the CPU, and how its grid is run."""
    # A name that this process has not loaded yet: for a path that comes again dlopen gives the library that it loaded
    # first, and pytest before 9.2 gives the next test the path of the folder that it removed after a passed one.
    library = tmp_path / f"{file}.{next(NUMBERS)}.so"
    options = [f"-D{name}={int(value)}" for name, value in defines.items()]
    folders = [f"-I{EMULATED}", f"-I{TEXT.parent}"]
    command = [str(COMPILER), "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-DEMULATE", *folders, *options]
    subprocess.run([*command, str(EMULATED / file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def run_text(
    tmp_path: Path,
    setup: Setup,
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """What ``_cuda`` does, on a CPU; the result is poisoned before."""
    defines = defines_of(packed, setup, x.dtype == torch.float16, silu)
    library = compiled(tmp_path, "linear.cpp", defines)
    tokens, tiles = x.shape[0], packed.out_features // 16
    out = torch.full((tokens, packed.out_features // (2 if silu else 1)), float("nan"), dtype=x.dtype)
    library.launch(
        *setup.grid(tokens, tiles),
        at(packed.words), at(packed.scale), at(x), at(bias), at(residual), at(out), tokens, tiles, packed.in_features,
    )  # fmt: skip
    return out


CASES = [
    (4, 32, 128, 64, 1, Setup(1, 1, 2, 2), torch.bfloat16),
    (4, 48, 96, 32, 5, Setup(1, 2, 2, 1), torch.bfloat16),
    (4, 16, 192, 96, 3, Setup(1, 1, 2, 2), torch.float16),
    (4, 32, 320, 320, 11, Setup(2, 1, 2, 4), torch.float16),
    (4, 48, 128, 128, 20, Setup(4, 2, 1, 2), torch.bfloat16),
    (8, 32, 128, 64, 1, Setup(1, 1, 2, 2), torch.bfloat16),
    (8, 48, 96, 32, 10, Setup(1, 2, 2, 1), torch.float16),
    (8, 16, 224, 224, 3, Setup(1, 1, 3, 2), torch.bfloat16),
    (8, 32, 64, 32, 40, Setup(8, 2, 1, 2), torch.bfloat16),
    (4, 80, 512, 128, 2, Setup(1, 4, 4, 2), torch.bfloat16),
    (8, 16, 1024, 128, 9, Setup(2, 4, 2, 8), torch.float16),
]


@needs_compiler
def test_a_path_that_comes_again(tmp_path: Path) -> None:
    """A case runs its own text, not that of a case before it, whatever pytest calls their folders."""
    folder, libraries = tmp_path / "again", []
    for inputs in (64, 128):
        folder.mkdir()
        defines = plain_defines_of(inputs, Setup(1, 1, inputs // 64, 1), is_half=False, silu=False)
        libraries.append(compiled(folder, "linear.cpp", defines))
        shutil.rmtree(folder)
    assert len({ctypes.cast(library.launch, ctypes.c_void_p).value for library in libraries}) == 2


@needs_compiler
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("bits", "out", "inputs", "group", "tokens", "setup", "dtype"), CASES)
def test_the_text(
    tmp_path: Path,
    bits: int,
    out: int,
    inputs: int,
    group: int,
    tokens: int,
    setup: Setup,
    dtype: torch.dtype,
    wide: bool,
) -> None:
    tensor, x = weight(bits, out, inputs, group, wide=wide), inputs_of(tokens, inputs, dtype)
    y = run_text(tmp_path, setup, x, pack_linear(tensor))
    assert error(y, exact(x, tensor)) <= bound(x, tensor)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_fused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bias, silu and residual, against the path that does them one by one."""
    packed = pack_linear(interleaved(weight(4, 16, 128, 32, seed=2), weight(4, 16, 128, 32, seed=3)))
    x = inputs_of(5, 128, dtype)
    bias, rest = inputs_of(1, 32, dtype, seed=4)[0], inputs_of(5, 16, dtype, seed=5)
    found = run_text(tmp_path, Setup(1, 1, 2, 2), x, packed, bias, rest, silu=True)
    right = low_bit_linear(x, packed, bias=bias, residual=rest, silu=True)
    assert error(found, right.double()) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


def run_plain_text(
    tmp_path: Path,
    setup: Setup,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """What ``run_plain`` does, on a CPU; the result is poisoned before."""
    (out_features, in_features), tokens = weight.shape, len(x)
    library = compiled(tmp_path, "linear.cpp", plain_defines_of(in_features, setup, x.dtype == torch.float16, silu))
    out = torch.full((tokens, out_features // (2 if silu else 1)), float("nan"), dtype=x.dtype)
    library.launch(
        *setup.grid(tokens, out_features // 16),
        at(weight), at(None), at(x), at(bias), at(residual), at(out), tokens, out_features // 16, in_features,
    )  # fmt: skip
    return out


PLAIN_CASES = [
    (32, 128, 1, Setup(1, 1, 2, 1), torch.bfloat16),
    (48, 96, 5, Setup(1, 2, 2, 1), torch.float16),
    (16, 672, 16, Setup(2, 1, 3, 2), torch.bfloat16),
    (80, 512, 3, Setup(1, 4, 4, 2), torch.bfloat16),
    (64, 1056, 11, plain_setup_of(11, 64, 1056), torch.bfloat16),
]


@needs_compiler
@pytest.mark.parametrize(("out", "inputs", "tokens", "setup", "dtype"), PLAIN_CASES)
def test_plain_weights(tmp_path: Path, out: int, inputs: int, tokens: int, setup: Setup, dtype: torch.dtype) -> None:
    x, plain = inputs_of(tokens, inputs, dtype), inputs_of(out, inputs, dtype, seed=3)
    right = x.double() @ plain.double().T
    y = run_plain_text(tmp_path, setup, x, plain)
    assert error(y, right) <= 2 * error((x.float() @ plain.float().T).to(dtype), right)


@needs_compiler
@pytest.mark.parametrize("silu", [False, True])
def test_what_is_fused_for_plain_weights(tmp_path: Path, silu: bool) -> None:
    """Gates are the weight's first half."""
    x, plain = inputs_of(5, 128, torch.bfloat16), inputs_of(64, 128, torch.bfloat16, seed=3)
    bias, rest = inputs_of(1, 64, torch.bfloat16, seed=4)[0], inputs_of(5, 32 if silu else 64, torch.bfloat16, seed=5)
    y = (x.float() @ plain.float().T + bias.float()).bfloat16()
    right = (gated_reference(y) if silu else y) + rest
    found = run_plain_text(tmp_path, Setup(1, 2, 2, 1), x, plain, bias, rest, silu)
    assert error(found, right.double()) < 8e-3


def run_arrange(tmp_path: Path, x: torch.Tensor, multiple: int) -> torch.Tensor:
    """What ``low_bit_cuda._arranged`` does, on a CPU; what is behind the last token stays poisoned."""
    tokens, inputs = x.shape
    slabs, padded = -(-inputs // 64), -(-tokens // multiple) * multiple
    y = torch.full((slabs, padded, 64), float("nan"), dtype=x.dtype)
    layout = {"BITS": 4, "HALF": 0, "GROUP": 0, "WIDE": 0, "TAIL": 0, "WARPS": 8}
    compiled(tmp_path, "arrange.cpp", layout).launch(
        -(-tokens * slabs * 2 // 256), at(x), at(y), tokens, padded, inputs
    )
    return y


def run_tiles(
    tmp_path: Path,
    setup: TileSetup,
    x: torch.Tensor,
    packed: PackedLinear,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """The text for many tokens, on a CPU; the result is poisoned before."""
    tokens, tiles = x.shape[0], packed.out_features // 16
    if setup.arranged:
        x = run_arrange(tmp_path, x, setup.tokens)
    library = compiled(tmp_path, "tiles.cpp", tile_defines_of(packed, setup, x.dtype == torch.float16, silu))
    out = torch.full((tokens, packed.out_features // (2 if silu else 1)), float("nan"), dtype=x.dtype)
    library.launch(
        *setup.grid(tokens, tiles), at(packed.words), at(packed.scale), at(x),
        at(bias), at(residual), at(out), tokens, tiles, packed.in_features,
    )  # fmt: skip
    return out


TILE_CASES = [
    (4, 80, 128, 64, 70, TileSetup(64), torch.bfloat16),
    (4, 48, 96, 32, 20, TileSetup(32, 3), torch.float16),
    (4, 16, 320, 320, 130, TileSetup(256), torch.bfloat16),
    (4, 144, 704, 64, 33, TileSetup(32, 2), torch.bfloat16),
    (4, 272, 448, 64, 33, TileSetup(32, 2, 2), torch.bfloat16),
    (4, 32, 576, 64, 66, TileSetup(64, 1, 2), torch.bfloat16),
    (4, 80, 704, 352, 70, TileSetup(32, 1, 2, 4), torch.bfloat16),
    (4, 272, 192, 64, 60, TileSetup(64, 2, 1, 2), torch.bfloat16),
    (4, 16, 64, 64, 30, TileSetup(32, 1, 2, 2), torch.bfloat16),
    (4, 80, 320, 64, 70, TileSetup(128, arranged=True), torch.bfloat16),
    (8, 32, 96, 32, 40, TileSetup(32, 1, 2, 2, arranged=True), torch.float16),
    (4, 80, 832, 64, 70, TileSetup(128, arranged=True), torch.bfloat16),
    (4, 32, 1088, 64, 40, TileSetup(32, 1, 2, arranged=True), torch.bfloat16),
    (8, 80, 192, 64, 40, TileSetup(64), torch.float16),
    (8, 32, 96, 32, 70, TileSetup(64, 1, 2), torch.bfloat16),
    (8, 32, 480, 480, 30, TileSetup(32, 3), torch.bfloat16),
]


@needs_compiler
@pytest.mark.parametrize(("bits", "out", "inputs", "group", "tokens", "setup", "dtype"), TILE_CASES)
def test_the_text_for_many_tokens(
    tmp_path: Path, bits: int, out: int, inputs: int, group: int, tokens: int, setup: TileSetup, dtype: torch.dtype
) -> None:
    """It multiplies by bf16(q s), as a BF16 layer does."""
    tensor, x = weight(bits, out, inputs, group), inputs_of(tokens, inputs, dtype)
    y = run_tiles(tmp_path, setup, x, pack_linear(tensor))
    assert error(y, exact(x, tensor)) <= bound(x, tensor)


@needs_compiler
def test_small_scales_in_fp16(tmp_path: Path) -> None:
    """FP16 has only some bits of numbers below 2^-14, as a layer's smallest scales may be."""
    tensor, x = weight(8, 32, 128, 64), inputs_of(40, 128, torch.float16)
    small = QuantizedTensor(tensor.codes, tensor.scale * 2.0**-10, tensor.scheme)
    assert 1e-6 < float(small.scale.abs().min()) < 2e-6
    y = run_tiles(tmp_path, TileSetup(64), x * 16, pack_linear(small))
    assert error(y, exact(x * 16, small)) <= bound(x * 16, small)


@needs_compiler
@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_what_is_fused_for_many_tokens(tmp_path: Path, silu: bool, arranged: bool) -> None:
    packed = pack_linear(interleaved(weight(4, 16, 128, 32, seed=2), weight(4, 16, 128, 32, seed=3)))
    x, bias = inputs_of(65, 128, torch.bfloat16), inputs_of(1, 32, torch.bfloat16, seed=4)[0]
    rest = inputs_of(65, 16 if silu else 32, torch.bfloat16, seed=5)
    found = run_tiles(tmp_path, TileSetup(64, 1, 2, 4, arranged), x, packed, bias, rest, silu)
    assert error(found, low_bit_linear(x, packed, bias=bias, residual=rest, silu=silu).double()) < 8e-3


@needs_compiler
def test_one_token_of_eight_is_not_touched_by_the_others(tmp_path: Path) -> None:
    """Each column of a product is a token's own: a NaN stays in its row."""
    packed, x = pack_linear(weight(4, 16, 64, 32)), inputs_of(4, 64, torch.bfloat16)
    x[2] = float("nan")
    y = run_text(tmp_path, Setup(1, 1, 1, 1), x, packed)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.skipif(not has_nvrtc(), reason="needs NVIDIA's compiler")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = TEXT.read_text(encoding="utf-8")
    for bits in (4, 8):
        packed = pack_linear(weight(bits, 16, 128, 64))
        for tokens in (1, 16, 32, 64):
            defines = defines_of(packed, setup_of(tokens, 64), is_half=bits == 8, silu=tokens == 16)
            cubin = compile_text(text, architecture, {name: int(value) for name, value in defines.items()})
            assert cubin.startswith(b"\x7fELF")
            assert compile_text(text, architecture, {name: int(value) for name, value in defines.items()}) == cubin
    assert len(list((tmp_path / "grace_vlm" / "cubin").iterdir())) == 8
    with pytest.raises(ConfigError, match="a kernel does not compile for sm_90: "):
        compile_text("nonsense", "sm_90", {})


@pytest.mark.skipif(not has_nvrtc(), reason="needs NVIDIA's compiler")
@pytest.mark.parametrize(("architecture", "early"), [("sm_80", 0), ("sm_90a", 1), ("sm_120", 1)])
def test_plain_weights_and_early_starts_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, early: int
) -> None:
    """Only where a kernel starts early does its code wait for others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few, arrange = (TEXT.with_name(name).read_text(encoding="utf-8") for name in (TEXT.name, "low_bit_arrange.cu"))
    layout = {"BITS": 4, "HALF": 0, "GROUP": 0, "WIDE": 0, "TAIL": 0}
    texts = [(arrange, layout)]
    for tokens, half in ((1, False), (16, True)):
        setup = plain_setup_of(tokens, 4096, 2048)
        texts.append((few, plain_defines_of(2048, setup, is_half=half, silu=half)))
    for text, defines in texts:
        made = [compile_text(text, architecture, {**defines, "EARLY_START": value}) for value in (0, early)]
        assert all(cubin.startswith(b"\x7fELF") for cubin in made)
        assert (made[0] == made[1]) == (not early)


@pytest.mark.skipif(not has_nvrtc(), reason="needs NVIDIA's compiler")
def test_the_text_for_many_tokens_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = TEXT.with_name("low_bit_tiles.cu").read_text(encoding="utf-8")
    for bits in (4, 8):
        packed = pack_linear(weight(bits, 16, 128, 64))
        for tokens in (65, 256, 4096):
            defines = tile_defines_of(
                packed, tile_setup_of(tokens, 4096, 2048, 132), is_half=bits == 8, silu=tokens == 65
            )
            assert compile_text(text, "sm_90a", {name: int(value) for name, value in defines.items()})


def test_setups_for_many_tokens() -> None:
    """What won in the sweep of an H100, where the rule finds it; and blocks enough for its multiprocessors."""
    assert tile_setup_of(64, 12288, 2048, 132) == TileSetup(64, 3, 1, 2)
    assert tile_setup_of(64, 22016, 4096, 132) == TileSetup(64, 3)
    assert tile_setup_of(256, 2048, 6144, 132) == TileSetup(128, 1, 2, 2, arranged=True)
    assert tile_setup_of(1024, 12288, 2048, 132) == TileSetup(256, 2, arranged=True)
    assert tile_setup_of(1024, 22016, 4096, 132) == TileSetup(128, 3, arranged=True)
    for tokens in (17, 33, 65, 300, 5000):
        for setup in tile_setups(tokens):
            assert setup.blocks * (setup.shared_bytes(silu=False) + 1024) <= 228 << 10, setup
            workers = setup.threads // 128 - 1
            given = 128 * setup.blocks * (workers * setup.registers + setup.OTHER_REGISTERS)
            assert given <= 65536, setup
    with pytest.raises(AssertionError):
        TileSetup(64, 1, 4)


def test_the_reference_of_the_fused_forms_is_transformers() -> None:
    """Norm as Qwen's: rounded to the inputs' dtype before its weight."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

    x, tensor = inputs_of(3, 64, torch.bfloat16), weight(8, 16, 64, 32)
    theirs = Qwen3VLTextRMSNorm(64, eps=1e-5)
    theirs.weight.data = inputs_of(1, 64, torch.bfloat16, seed=9)[0]
    packed = pack_linear(tensor)
    found = low_bit_linear(x, packed, norm=Norm(theirs.weight.data, 1e-5))
    assert torch.equal(found, low_bit_linear(theirs(x), packed))
