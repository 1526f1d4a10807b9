"""llama.cpp beside our engine: the same codes in a GGUF file, and its server in this process (the xllamacpp wheel).

Every file has a head, and embeddings tied to it, in 8 bits (Q8_0, 32 numbers a scale), as our engine has them with
``int8_head`` (a scale a row): both read as many bytes for it. xllamacpp is no dependency of grace-vlm.
"""

from __future__ import annotations

import importlib.metadata
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grace_vlm.formats.gguf_blocks import BLOCK, pack_blocks
from grace_vlm.formats.gguf_file import F32, Q4_0, Q8_0, GgufFile, Kind, write_gguf
from grace_vlm.formats.pack import pack
from grace_vlm.formats.publish import publish_model
from grace_vlm.models.load import LoadedModel
from grace_vlm.quant.affine import quantize_tensor
from grace_vlm.quant.scale_init import minmax_scale
from grace_vlm.quant.scheme import QuantizedTensor, QuantScheme

HEAD = "token_embd.weight"

Turn = Callable[[], tuple[float, float]]
"""Answers one request: seconds to the first token, and milliseconds a token after it."""


def blocks_of(values: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Bytes of a matrix rounded to nearest, 32 numbers a scale."""
    scheme = QuantScheme(4 if kind == Q4_0 else 8, BLOCK)
    tensor = quantize_tensor(values, minmax_scale(values, scheme), scheme)
    return pack_blocks(tensor.codes, tensor.scale, kind)


def packed_model(loaded: LoadedModel, codes: dict[str, QuantizedTensor], folder: Path) -> Path:
    """A GGUF file of the very codes that our engine runs: as ``grace pack`` writes it, but for the head."""
    published = publish_model(folder / "model", loaded.model, loaded.processor, codes, (), "random weights\n")
    file, path = GgufFile(pack(published, folder / "gguf", "gguf") / "model.gguf"), folder / "model.gguf"
    kinds = {name: (Q8_0 if name == HEAD else tensor.kind, tensor.shape) for name, tensor in file.tensors.items()}

    def load(name: str) -> torch.Tensor:
        return blocks_of(file.tensor(name).float(), Q8_0) if name == HEAD else file.raw(name)

    write_gguf(path, file.values, kinds, load)
    return path


def packed_text_model(source: Path, path: Path) -> Path:
    """A GGUF file of another one's weights, read as BF16: linears as Q4_0, the head as Q8_0, vectors as FP32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {
        name: (F32 if len(tensor.shape) == 1 else Q8_0 if name == HEAD else Q4_0, tuple(map(int, tensor.shape[::-1])))
        for name, tensor in tensors.items()
    }

    def load(name: str) -> torch.Tensor:
        tensor, (kind, shape) = tensors[name], kinds[name]
        whole = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
        return whole if kind == F32 else blocks_of(whole.bfloat16().float(), kind)

    write_gguf(path, values, kinds, load)
    return path


def serve(path: Path, room_tokens: int, num_threads: int) -> Any:
    """llama.cpp's server on a file; its text alone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.ui = room_tokens, 1, True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    params.cache_prompt, params.cache_ram_mib = False, 0
    return xllamacpp.Server(params)


def server_turn(server: Any, ids: list[int], num_tokens: int) -> Turn:
    """One request to a server; times are the server's own."""
    request = {
        "prompt": ids,
        "n_predict": num_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "cache_prompt": False,
    }
    request |= {"samplers": ["top_k"], "top_k": 1}

    def turn() -> tuple[float, float]:
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.listening_address + "/completion", json.dumps(request).encode(), headers)
        with urllib.request.urlopen(call, timeout=600) as reply:
            timings = json.load(reply)["timings"]
        if timings["prompt_n"] != len(ids) or timings["predicted_n"] != num_tokens:
            raise ValueError(f"llama.cpp read {timings['prompt_n']} tokens and made {timings['predicted_n']}")
        # The second clock starts with the first token.
        return float(timings["prompt_ms"]) / 1000, float(timings["predicted_ms"]) / (num_tokens - 1)

    return turn


def version() -> str:
    """Of the wheel, with the vector instructions that it was compiled for."""
    import xllamacpp

    said = str(xllamacpp.get_system_info()).replace("CPU :", "").split("|")
    words = [one.partition("=")[0].strip() for one in said if one.strip().endswith("= 1")]
    return f"xllamacpp {importlib.metadata.version('xllamacpp')} {' '.join(words)}"
