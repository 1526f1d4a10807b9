"""GGUF: what llama.cpp loads, a file for the text and one for the pictures.

    model.gguf     decoder: quantized linears as Q4_0 (W4) or Q8_0 (W8), other matrices BF16, vectors F32; tokenizer
    mmproj.gguf    vision tower and projector: matrices BF16; vectors, convolutions and positions F32
    config.json    with the tokenizer's and the processor's files: for us, llama.cpp does not read them

A group is several blocks of 32 with one scale (``gguf_blocks.py``); ``grace.group_size`` in the header says how many,
so reading joins them again. Scales are FP16. Under the architecture ``llama`` the rows of q and k are interleaved, a
head's two halves one by one, for another form of rotary embedding: codes and scales move alike.

Files of llama.cpp's own are read too, if all their tensors are of these kinds: as groups of 32, and under any file
names. Their Q4_0 has blocks of negative scale, where -8 with its sign changed is 8: such a model is read as W8G32,
which is the same weights. F32 that BF16 holds comes back as BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from grace_vlm.checkpoint.strict_json import shown
from grace_vlm.errors import FormatError
from grace_vlm.formats.converter import Converter, ModelContent, copy_companions, neutral_scale, refuse, write_config
from grace_vlm.formats.folder import check_tensor
from grace_vlm.formats.gguf_blocks import BLOCK, pack_blocks, unpack_blocks, with_scales
from grace_vlm.formats.gguf_file import BF16, DTYPES, F16, F32, Q4_0, Q8_0, GgufFile, Kind, Value, write_gguf
from grace_vlm.formats.gguf_names import ARCHITECTURES, BY_MODEL_TYPE, LLAVA, TEXT, Names, prefixes_of
from grace_vlm.formats.gguf_tokenizer import tokenizer_values
from grace_vlm.formats.gguf_values import parsed_config, require_agreement, text_values, vision_values
from grace_vlm.formats.lazy import Lazy, TensorSpec, spec_of
from grace_vlm.formats.shards import INDEX, WEIGHTS
from grace_vlm.formats.weights import read_inside, require_inside
from grace_vlm.models.llama_cpp import apart, interleaved
from grace_vlm.quant.plan import PlanEntry
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme, ScaleRounding

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
_GROUP_SIZE, _PREFIXES = "grace.group_size", "grace.prefixes"
_KIND_OF_BITS = {4: Q4_0, 8: Q8_0}
_BITS_OF_KIND = {kind: bits for bits, kind in _KIND_OF_BITS.items()}
_LINEARS = tuple(rest.removesuffix(".weight").split(".N.")[-1] for rest in TEXT if "_proj.weight" in rest)
_ENDS = ("embed_tokens", "lm_head")


class _Heads:
    """Which tensors are interleaved, and by how many heads."""

    def __init__(self, is_llama: bool, num_heads: int, num_kv_heads: int) -> None:
        self._of = {"attn_q": num_heads, "attn_k": num_kv_heads} if is_llama else {}

    def of(self, name: str) -> int | None:
        parts = name.split(".")
        return self._of.get(parts[2]) if parts[0] == "blk" and len(parts) > 3 else None


class Gguf(Converter):
    """The converter; see the head of the file."""

    name = "gguf"
    scale_dtype = torch.float16

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        return any(folder.glob("*.gguf")) and not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file()

    def refusal(self, linears: Mapping[str, PlanEntry], dense_names: Container[str]) -> str | None:
        sizes = {entry.scheme.group_size for entry in linears.values() if entry.scheme}
        if len(sizes) > 1:
            return f"gguf records one group size for the whole model; this one has {sorted(sizes)}"
        for name, entry in linears.items():
            assert entry.scheme is not None
            if entry.scheme.num_bits not in _KIND_OF_BITS:
                return f"{name} is {entry.scheme.name}; gguf holds w4 or w8 only: quantize to w4g128"
            if not ("layers." in name and name.endswith(_LINEARS)) and name.rpartition(".")[2] not in _ENDS:
                return f"{name} has a grid; gguf packs the decoder: leave quant.tower and .projector in bf16"
            if entry.scheme.group_size % BLOCK:
                return f"{name} is {entry.scheme.name}; gguf needs groups of a multiple of {BLOCK}"
        return None

    def linear_bytes(self, entry: PlanEntry) -> int:
        assert entry.scheme is not None
        kind = _KIND_OF_BITS[entry.scheme.num_bits]
        return entry.out_features * entry.in_features // kind.block * kind.num_bytes + 256

    def read(self, folder: Path) -> ModelContent:
        return _Reader(folder).content()

    def inspect(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        from grace_vlm.formats.inspect import inspect_content

        reader = _Reader(folder)
        content = reader.content()
        return inspect_content(content, reader.linear_bytes(content.linears), progress)

    def write(self, content: ModelContent, stage: Path) -> None:
        refuse(self, content)
        copy_companions(content, stage)
        write_config(stage, content.config)
        try:
            _Writer(content, stage).write()
        except FormatError as error:  # the stage goes away: the files at fault are those of the source
            raise FormatError(str(error).replace(str(stage), str(content.folder))) from error


class _Writer:
    def __init__(self, content: ModelContent, stage: Path) -> None:
        self.content, self.stage = content, stage
        model_type = content.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
            raise FormatError(f"gguf is written for {', '.join(BY_MODEL_TYPE)}; this model is {shown(model_type)}")
        self.architecture, self.projector = BY_MODEL_TYPE[model_type]
        self.config = parsed_config(content.config)
        self.text = self.config.get_text_config()
        stock = [*content.dense, *(f"{name}.weight" for name in content.linears)]
        deepstack = getattr(self.config.vision_config, "deepstack_visual_indexes", ())
        prefixes = prefixes_of(self.architecture, stock)
        self.names = Names(self.architecture, self.projector, prefixes, tuple(deepstack))
        is_llama = self.architecture is LLAVA
        self.heads = _Heads(is_llama, self.text.num_attention_heads, self.text.num_key_value_heads)
        # Name in the file -> stock name and which of its pieces.
        self.pieces = {
            target: (name, index, len(targets))
            for name in stock
            for targets in (self.names.in_file(name),)
            for index, target in enumerate(self._present(name, targets))
        }

    def _present(self, name: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        """``targets``, after it is certain that the tensor can be cut into as many."""
        if len(targets) > 1:
            shape = spec_of(self.content.dense, name).shape
            frames = len(shape) == 5
            if (shape[2] if frames else shape[0]) % len(targets) or (frames and shape[2] != len(targets)):
                raise FormatError(f"gguf cuts {name} into {len(targets)}; its shape is {shape}")
        return targets

    def write(self) -> None:
        linears = self.content.linears
        kinds = [_KIND_OF_BITS[entry.scheme.num_bits] for entry in linears.values() if entry.scheme]
        require_agreement(self.config, self.architecture, {name: self._place(name)[1] for name in self.pieces})
        values = text_values(self.config, self.architecture, kinds)
        values |= tokenizer_values(self.stage, self.text.vocab_size)
        own: dict[str, Value] = {_PREFIXES: list(self.names.prefixes)}
        for size in {entry.scheme.group_size for entry in linears.values() if entry.scheme}:  # one, or none
            own[_GROUP_SIZE] = size
        self._write(MODEL, {**values, **own}, of_text=True)
        self._write(MMPROJ, vision_values(self.config, self.architecture, self.projector, self.stage), of_text=False)

    def _write(self, file: str, values: Mapping[str, Value], of_text: bool) -> None:
        names = [name for name in self.pieces if name.startswith(("blk.", "token_embd", "output")) is of_text]
        write_gguf(self.stage / file, values, {name: self._place(name) for name in names}, self._bytes)

    def _place(self, name: str) -> tuple[Kind, tuple[int, ...]]:
        stock, _, count = self.pieces[name]
        entry = self.content.linears.get(stock.removesuffix(".weight"))
        if entry is not None and entry.scheme is not None:
            return _KIND_OF_BITS[entry.scheme.num_bits], (entry.out_features, entry.in_features)
        spec = spec_of(self.content.dense, stock)
        shape = spec.shape
        if count > 1:
            shape = shape[:2] + shape[3:] if len(shape) == 5 else (shape[0] // count, *shape[1:])
        if spec.dtype == torch.float32 or len(shape) != 2 or name.startswith("v.position_embd"):
            return F32, shape
        if spec.dtype not in (torch.bfloat16, torch.float16):
            raise FormatError(f"{stock} is {spec.dtype}; gguf is written of BF16, FP16 and FP32")
        return (BF16 if spec.dtype == torch.bfloat16 else F16), shape

    def _bytes(self, name: str) -> torch.Tensor:
        stock, index, count = self.pieces[name]
        kind, shape = self._place(name)
        heads = self.heads.of(name)
        if kind in _BITS_OF_KIND:
            tensor = self.content.quantized[stock.removesuffix(".weight")]
            codes, scale = tensor.codes, tensor.scale
            if heads:
                codes, scale = interleaved(codes, heads), interleaved(scale, heads)
            return pack_blocks(codes, scale, kind)
        values = self.content.dense[stock]
        if count > 1:
            values = values[:, :, index] if values.ndim == 5 else values.chunk(count)[index]
        if heads:
            values = interleaved(values, heads)
        return values.to(DTYPES[kind]).reshape(shape)


class _Reader:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [self._open(path) for path in sorted(folder.glob("*.gguf"))]
        text = [file for file in files if file.text("general.architecture") != "clip"]
        vision = [file for file in files if file.text("general.architecture") == "clip"]
        if len(text) != 1 or len(vision) != 1:
            raise FormatError(
                f"{folder} has {len(text)} GGUF files of text and {len(vision)} of a vision tower; expected one of each"
            )
        self.text, self.vision = text[0], vision[0]
        architecture = self.text.text("general.architecture")
        if architecture not in ARCHITECTURES:
            raise FormatError(
                f"{self.text.path} has architecture {shown(architecture)}; read are {', '.join(ARCHITECTURES)}"
            )
        self.architecture = ARCHITECTURES[architecture]
        self.names = Names(self.architecture, self._projector(), self._prefixes(), self._deepstack())
        self.heads = _Heads(False, 1, 1)
        if self.architecture is LLAVA:
            counts = [
                self.text.number(f"llama.attention.{key}", most=1 << 16) for key in ("head_count", "head_count_kv")
            ]
            self.heads = _Heads(True, *counts)
        self.owner = {name: file for file in (self.text, self.vision) for name in file.tensors}
        if len(self.owner) != len(self.text.tensors) + len(self.vision.tensors):
            raise FormatError(f"{folder} has a tensor in both of its GGUF files; expected each in one")
        self.targets = self.names.of_files(name for name in self.owner if name != "rope_freqs.weight")
        self.dtypes: dict[str, torch.dtype] = {}

    @staticmethod
    def _open(path: Path) -> GgufFile:
        return GgufFile(require_inside(path))

    def _projector(self) -> str:
        found = self.vision.text("clip.projector_type") or self.vision.text("clip.vision.projector_type")
        if found not in self.architecture.projectors:
            expected = " or ".join(self.architecture.projectors)
            raise FormatError(f"{self.vision.path} has clip.projector_type {shown(found)}; expected {expected}")
        return found

    def _prefixes(self) -> tuple[str, str, str, str]:
        found = self.text.values.get(_PREFIXES, list(self.architecture.prefixes))
        if not isinstance(found, list) or len(found) != 4 or not all(isinstance(prefix, str) for prefix in found):
            raise FormatError(f"{self.text.path} has {_PREFIXES} = {shown(found)}; expected four strings")
        return str(found[0]), str(found[1]), str(found[2]), str(found[3])

    def _deepstack(self) -> tuple[int, ...]:
        marked = self.vision.values.get("clip.vision.is_deepstack_layers", [])
        return tuple(i for i, is_marked in enumerate(marked) if is_marked) if isinstance(marked, list) else ()

    @cached_property
    def group_size(self) -> int | None:
        """What the file records; None for a file that is not ours."""
        return self.text.number(_GROUP_SIZE) if _GROUP_SIZE in self.text.values else None

    def content(self) -> ModelContent:
        config_file = self.folder / "config.json"
        quantized = {
            stock.removesuffix(".weight"): targets[0]
            for stock, targets in self.targets.items()
            if stock.endswith(".weight") and self._kind(targets[0]) in _BITS_OF_KIND
        }
        rounding = self._rounding(quantized)
        entries = {name: self._entry(name, target, rounding) for name, target in quantized.items()}
        dense = [stock for stock in self.targets if stock.removesuffix(".weight") not in entries]
        if strange := [stock for stock in dense if self._kind(self.targets[stock][0]) in _BITS_OF_KIND]:
            raise FormatError(f"{self.folder}: {strange[0]} is quantized, but no matrix of a linear")

        def load(name: str) -> QuantizedTensor:
            entry = entries[name]
            assert entry.scheme is not None
            codes, scale = self._grid(quantized[name], entry.scheme.group_size)
            if int(codes.min()) < entry.scheme.qmin or int(codes.max()) > entry.scheme.qmax:
                raise FormatError(f"{quantized[name]} of {self.folder} has a code beyond {entry.scheme.name}")
            scale = scale.float() if rounding == "fp32" else scale.to(torch.bfloat16)
            return check_tensor(name, QuantizedTensor(codes.to(torch.int8), scale, entry.scheme), entry)

        matrices = (n for n in dense if n.endswith(".weight") and len(self._shape(n)) == 2 and "embed" not in n)
        return ModelContent(
            layout=Gguf.name,
            folder=self.folder,
            config=read_inside(self.folder, config_file.name) if config_file.is_file() else {},
            linears=entries,
            quantized=Lazy(entries, load),
            baked={},
            dense=Lazy(dense, self._dense, self._spec),
            bf16_names=tuple(name.removesuffix(".weight") for name in matrices),
        )

    def linear_bytes(self, linears: Mapping[str, PlanEntry]) -> dict[str, int]:
        """What the blocks of each quantized linear take in the file."""
        kinds = {name: self._kind(self.targets[f"{name}.weight"][0]) for name in linears}
        return {
            name: entry.out_features * entry.in_features // kinds[name].block * kinds[name].num_bytes
            for name, entry in linears.items()
        }

    def _kind(self, target: str) -> Kind:
        return self.owner[target].tensors[target].kind

    def _rounding(self, quantized: Mapping[str, str]) -> ScaleRounding:
        """BF16 if that holds every scale of the model, so that it is one rounding for all."""
        for target in quantized.values():
            d = unpack_blocks(self.owner[target].raw(target), self._kind(target))[1]
            if neutral_scale(d)[1] == "fp32":
                return "fp32"
        return "bf16"

    def _entry(self, name: str, target: str, rounding: ScaleRounding) -> PlanEntry:
        kind, shape, _ = self.owner[target].tensors[target]
        if len(shape) != 2:
            raise FormatError(f"{target} of {self.folder} is quantized with {len(shape)} axes; expected a matrix")
        size, bits = self.group_size or BLOCK, _BITS_OF_KIND[kind]
        if size % BLOCK or shape[1] % size:
            raise FormatError(
                f"{self.folder} has {_GROUP_SIZE} {size}; {target} has rows of {shape[1]} in blocks of 32"
            )
        if self.heads.of(target) and shape[0] % (2 * (self.heads.of(target) or 1)):
            raise FormatError(f"{target} of {self.folder} has {shape[0]} rows for {self.heads.of(target)} heads")
        return PlanEntry(name, *shape, QuantScheme(bits, size, rounding))

    def _grid(self, target: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scale FP32) in our order of rows; a block without a scale has one."""
        codes, d = unpack_blocks(self.owner[target].raw(target), self._kind(target))
        if self.group_size is None:
            codes, d = with_scales(codes, d)
        groups = d.reshape(len(d), -1, group_size // BLOCK)
        if not torch.equal(groups, groups[..., :1].expand_as(groups)):
            raise FormatError(f"{target} of {self.folder} has blocks of one group with different scales")
        scale, heads = groups[..., 0].float(), self.heads.of(target)
        return (apart(codes, heads), apart(scale, heads)) if heads else (codes, scale)

    def _shape(self, stock: str) -> tuple[int, ...]:
        targets = self.targets[stock]
        shape = self.owner[targets[0]].tensors[targets[0]].shape
        if len(targets) == 1:
            return shape
        return (*shape[:2], len(targets), *shape[2:]) if len(shape) == 4 else (shape[0] * len(targets), *shape[1:])

    def _spec(self, stock: str) -> TensorSpec:
        if stock not in self.dtypes:
            kinds = {self._kind(target) for target in self.targets[stock]}
            self.dtypes[stock] = DTYPES[min(kinds)] if kinds <= {BF16, F16} else self._dense(stock).dtype
        return TensorSpec(self.dtypes[stock], self._shape(stock))

    def _dense(self, stock: str) -> torch.Tensor:
        targets = self.targets[stock]
        parts = [self.owner[target].tensor(target) for target in targets]
        if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
            raise FormatError(f"{', '.join(targets)} of {self.folder} differ in shape or kind")
        values = parts[0] if len(parts) == 1 else torch.stack(parts, 2) if parts[0].ndim == 4 else torch.cat(parts)
        if heads := self.heads.of(targets[0]):
            values = apart(values, heads)
        return neutral_scale(values)[0] if values.dtype == torch.float32 else values
