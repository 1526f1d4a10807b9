"""Our engine as a model of lmms-eval: ``python -m lmms_eval --model grace_vlm --model_args pretrained=DIR``.

lmms-eval finds ``manifest`` by the entry point group ``lmms_eval.models`` and asks for ``GraceVLM`` by name. That class
is made when it is asked for, because its base is lmms-eval's: nothing here needs lmms-eval to be installed.

What a task asks is taken as it stands, or refused: one turn of the user's with texts and pictures in their order, and
generation kwargs of which none is dropped in silence. Two things follow lmms-eval's own Qwen3-VL class: an answer is at
most 128 tokens where the task says nothing, and the stop text ``\\n\\n``, which lmms-eval adds to every task that names
none, stops nothing. No system prompt is added, and pictures keep the area that the model's processor allows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from grace_vlm.errors import ConfigError, RequestError

MAX_NEW_TOKENS = 128
ADDED_STOP = "\n\n"
_SAMPLING = ("top_p", "top_k", "seed")
_KNOWN = ("max_new_tokens", "temperature", "do_sample", "until", "num_beams", *_SAMPLING, "repetition_penalty")
_LLAVA_ONLY = "image_aspect_ratio"
"""LLaVA's own classes resize by it; elsewhere a picture is the processor's business."""


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("grace_vlm", chat_class_path=f"{__name__}.GraceVLM")


def __getattr__(name: str) -> Any:
    if name == "GraceVLM":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class() -> type:
    from lmms_eval.api.model import lmms

    class GraceVLM(Answering, lmms):
        """``Answering``, registered."""

    return GraceVLM


class Answering:
    """What lmms-eval calls.

    Args:
        pretrained: as ``grace eval`` takes MODEL. batch_size: questions that run together. device: auto, cpu, cuda or
            cuda:N. max_pixels: area that larger pictures are shrunk to. The others: as ``grace eval`` has them.

    Raises:
        ConfigError: an argument that cannot be used, or several processes.
    """

    is_simple = False  # asked by messages, not by a text beside a list of pictures
    task_dict: Mapping[str, Any]

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str | None = 64,
        device: str | None = None,
        max_pixels: int | None = None,
        cache_tokens: int = 16_384,
        cpu_activations: str = "fp32",
        batch_invariant: bool = False,
        max_batch_size: int | None = None,  # lmms-eval's, for a batch_size of auto
        **others: object,
    ) -> None:
        if others:
            raise ConfigError(f"--model_args has {', '.join(others)}, which grace_vlm does not know; leave it out")
        if not pretrained:
            raise ConfigError("--model_args has no pretrained; expected pretrained=DIR, a model folder or a hub id")
        if not str(batch_size).isdecimal() or int(batch_size or 0) < 1:
            raise ConfigError(f"--batch_size is {batch_size}; expected a number, for example 64")
        if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ConfigError(
                f"{processes} processes were started; start one, or share the work by grace eval --part 1/{processes}"
            )
        super().__init__()
        self.batch_size = int(batch_size or 0)
        self.llm = _opened(
            str(pretrained), device, self.batch_size, max_pixels, cache_tokens, cpu_activations, batch_invariant
        )

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """The answers, in the order of the requests.

        Raises:
            RequestError: one that cannot be answered; it names task and row.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from tqdm import tqdm

        found: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="answering", disable=None) as bar:
            for asked, answer in self.llm.answers(self._asked(requests)):
                if isinstance(answer, RequestError):
                    raise RequestError(f"{_named(requests[int(asked.id)])}: {answer}")
                counts = TokenCounts(answer.num_prompt_tokens, len(answer.token_ids))
                found[int(asked.id)] = GenerationResult(answer.text, counts)
                bar.update()
        return found

    def _asked(self, requests: Sequence[Any]) -> Iterator[Any]:
        from grace_vlm.engine.llm import Asked

        for number, request in enumerate(requests):
            _, messages_of, kwargs, row, task, split = request.args
            try:
                parts = parts_of(messages_of(self.task_dict[task][split][row]))
                yield Asked(str(number), parts, (), sampling_of(kwargs))
            except RequestError as error:
                raise RequestError(f"{_named(request)}: {error}") from None

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        raise RequestError("grace_vlm writes answers and ranks no given ones; choose a task of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        raise RequestError("grace_vlm answers one turn; choose a task of generate_until")


def _named(request: Any) -> str:
    return f"{request.task_name}, row {request.doc_id}"


def _opened(
    pretrained: str,
    device: str | None,
    batch_size: int,
    max_pixels: int | None,
    cache_tokens: int,
    cpu_activations: str,
    batch_invariant: bool,
) -> Any:
    """The model on the engine, as ``grace eval --suite`` opens it."""
    from grace_vlm.data.pictures import largest_area
    from grace_vlm.engine.engine import EngineOptions
    from grace_vlm.engine.llm import LLM
    from grace_vlm.engine.open import open_model

    sizes = {"max_running": batch_size, "max_step_tokens": max(2048, batch_size), "cache_tokens": cache_tokens}
    options = EngineOptions(**sizes, cpu_activations=cpu_activations, batch_invariant=batch_invariant)  # type: ignore[arg-type]
    loaded, codes = open_model(pretrained, device or "auto")
    # The processor's own area on a CPU too, where ``LLM`` alone would take less: a score is the model's.
    area = largest_area(loaded.processor) if max_pixels is None else max_pixels
    return LLM(loaded, options=options, quantized=codes, max_pixels=area)


def parts_of(messages: Sequence[Mapping[str, Any]]) -> Any:
    """A task's messages as a prompt of the engine.

    Raises:
        RequestError: more than one turn of the user's, or something that is neither text nor picture.
    """
    from grace_vlm.engine.llm import Parts

    roles = [str(message["role"]) for message in messages]
    if roles != ["user"]:
        raise RequestError(f"the task's messages are those of {', '.join(roles) or 'nobody'}; expected one user's")
    content = messages[0]["content"]
    parts: list[Any] = []
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if item["type"] == "text":
            parts.append(item["text"])
        elif item["type"] == "image":
            picture = item["url"]
            parts.append(Path(picture) if isinstance(picture, str) else picture)
        else:
            raise RequestError(f"the task asks about {item['type']}; expected texts and images")
    return Parts(tuple(parts))


def sampling_of(kwargs: Mapping[str, Any]) -> Any:
    """A task's ``generation_kwargs`` as the engine's. Greedy unless ``do_sample`` or a temperature asks for more;
    ``top_p``, ``top_k`` and ``seed`` say nothing where nothing is drawn.

    Raises:
        RequestError: one that the engine does not have, or with a value that it cannot have.
    """
    from grace_vlm.engine.sampling import SamplingParams

    given = {name: value for name, value in kwargs.items() if value is not None and name != _LLAVA_ONLY}
    if unknown := [name for name in given if name not in _KNOWN]:
        known = ", ".join(_KNOWN)
        raise RequestError(f"generation_kwargs has {', '.join(unknown)}; grace_vlm knows {known}: use --gen_kwargs")
    if given.get("num_beams", 1) != 1:
        raise RequestError(f"num_beams is {given['num_beams']}; expected 1: the engine searches no beams")
    temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
    temperature = temperature if given.get("do_sample", True) else 0.0
    until = given.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    drawn = {name: given[name] for name in _SAMPLING if name in given} if temperature > 0 else {}
    return SamplingParams(
        max_tokens=given.get("max_new_tokens", MAX_NEW_TOKENS),
        temperature=temperature,
        repetition_penalty=given.get("repetition_penalty", 1.0),
        stop=tuple(stop for stop in stops if stop not in ("", ADDED_STOP)),
        **drawn,
    )
