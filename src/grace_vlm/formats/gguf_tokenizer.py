"""A tokenizer as the values of a GGUF header, from the ``tokenizer.json`` that Transformers writes.

Two kinds exist in the families that we write:

- byte-level BPE (Qwen): ``tokenizer.ggml.model = gpt2`` with tokens, merges, and ``pre``, llama.cpp's name for the
  expression that cuts a text into words before;
- BPE with byte fallback (Llama): ``llama``, with a score a token. llama.cpp merges the neighbours whose joined token
  has the highest score; a token's score is minus the rank of the first merge that makes it, which is the order that
  Llama's own scores have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_vlm.checkpoint.strict_json import read_object, shown
from grace_vlm.errors import FormatError
from grace_vlm.formats.gguf_file import Value
from grace_vlm.formats.gguf_template import for_llama_cpp

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {_QWEN2: "qwen2"}
"""Expression -> llama.cpp's name of it."""


def tokenizer_values(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The ``tokenizer.*`` values of the tokenizer in a model folder.

    Args:
        vocab_size: rows of the embedding; ids without a token are filled up.

    Raises:
        FormatError: no ``tokenizer.json``, or one of another kind.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FormatError(f"gguf carries the tokenizer, and there is no {path.name}; put the model's own beside it")
    state, settings = read_object(path, FormatError), _object(folder / "tokenizer_config.json")
    try:
        model, added = state["model"], state["added_tokens"]
        # Where bytes are characters before any merge nothing is left to fall back from, whatever the model says.
        kinds = [part.get("type") for part in _parts(state, "pre_tokenizer", "pretokenizers")]
        is_bytes = bool(model.get("byte_fallback")) and "ByteLevel" not in kinds
        ids: dict[str, int] = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        special = {token["content"]: bool(token["special"]) for token in added}
        merges = _merges(model["merges"])
        if odd := [token for token, index in ids.items() if not isinstance(token, str) or type(index) is not int]:
            raise TypeError(f"{shown(odd[0])} is no token with a number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise FormatError(f"{path} is no BPE tokenizer ({reason}); gguf is written for Qwen's and Llama's") from error
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, index in ids.items():
        if not 0 <= index < vocab_size:
            where = f"{path} has token {shown(token)} with id {shown(index)}"
            raise FormatError(f"{where}; the model has {vocab_size} embeddings")
        tokens[index] = token
        types[index] = _type(token, special, is_bytes, model.get("unk_token"))
    values: dict[str, Value] = {"tokenizer.ggml.model": "llama" if is_bytes else "gpt2"}
    if is_bytes:
        values["tokenizer.ggml.pre"] = "default"
        values["tokenizer.ggml.scores"] = _scores(tokens, merges)
        values["tokenizer.ggml.add_space_prefix"] = _adds_space(state)
    else:
        values["tokenizer.ggml.pre"] = _pre(path, state)
        values["tokenizer.ggml.merges"] = merges
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for name, key in names.items():
        stated = settings.get(key)
        content = stated.get("content") if isinstance(stated, dict) else stated
        if isinstance(content, str) and content in ids:
            values[f"tokenizer.ggml.{name}_token_id"] = ids[content]
    values["tokenizer.ggml.add_bos_token"] = _adds_bos(state, settings)
    template = _chat_template(folder, settings)
    return values | ({"tokenizer.chat_template": for_llama_cpp(template)} if template else {})


def _merges(stated: Any) -> list[str]:
    """Pairs of tokens, "a b" each, from strings or lists of two; ``TypeError`` for anything else."""
    if not isinstance(stated, list):
        raise TypeError(f"merges is a {type(stated).__name__}, no list")
    for merge in stated:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TypeError(f"merge {shown(merge)} is no pair of tokens")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in stated]


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, FormatError) if path.is_file() else {}


def _type(token: str, special: dict[str, bool], is_bytes: bool, unknown: str | None) -> int:
    if is_bytes and token == unknown:
        return _UNKNOWN
    if token in special:
        return _CONTROL if special[token] else _USER_DEFINED
    if is_bytes and len(token) == 6 and token.startswith("<0x"):
        return _BYTE
    return _NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges, start=1):
        rank.setdefault(merge.replace(" ", "", 1), number)
    lowest = len(merges) + 1
    return [-float(rank.get(token, lowest)) for token in tokens]


def _parts(state: dict[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    """The members of a sequence, or the one that there is."""
    found = state.get(key)
    parts = found.get(inner, [found]) if isinstance(found, dict) else []
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _pre(path: Path, state: dict[str, Any]) -> str:
    parts = _parts(state, "pre_tokenizer", "pretokenizers")
    # Named by what they are: ByteLevel's own expression is GPT-2's, and SmolLM cuts off every digit before it.
    kinds = [part.get("type") for part in parts]
    if parts and kinds[-1] == "ByteLevel" and parts[-1].get("use_regex") and not parts[-1].get("add_prefix_space"):
        if len(parts) == 1:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
    splits = [part.get("pattern") for part in parts if part.get("pattern")]
    expressions = [split.get("Regex") for split in splits if isinstance(split, dict)]
    if len(expressions) == 1 and isinstance(expressions[0], str) and expressions[0] in _PRE:
        return _PRE[expressions[0]]
    raise FormatError(
        f"{path} cuts words by {shown(expressions)}, for which llama.cpp has no name here; known are Qwen's, "
        "GPT-2's, SmolLM's and Llama's"
    )


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a text's first word is read as if a space stood before it."""
    metaspace = [part for part in _parts(state, "pre_tokenizer", "pretokenizers") if part.get("type") == "Metaspace"]
    prepends = any(part.get("type") == "Prepend" for part in _parts(state, "normalizer", "normalizers"))
    return prepends or any(part.get("prepend_scheme", "always") != "never" for part in metaspace)


def _adds_bos(state: dict[str, Any], settings: dict[str, Any]) -> bool:
    """As Transformers does: by its setting, or because the template that goes around a text begins with it."""
    stated = settings.get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    templates = [part.get("single") for part in _parts(state, "post_processor", "processors")]
    firsts = [template[0] for template in templates if isinstance(template, list) and template]
    return any(isinstance(first, dict) and "SpecialToken" in first for first in firsts)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{jinja} is not UTF-8 ({error.reason})") from error
    for stated in (_object(folder / "chat_template.json").get("chat_template"), settings.get("chat_template")):
        if isinstance(stated, str):
            return stated
    return ""
