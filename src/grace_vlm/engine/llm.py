"""A model that answers, for people who write Python.

    >>> llm = LLM("runs/demo/grace_w4")
    >>> llm.generate("what is in the picture?", images="cat.png")[0].text
    >>> llm.generate(["one", "two"], sampling=SamplingParams(max_tokens=20, temperature=0.7, seed=1))
    >>> for piece in llm.stream("tell me a story"): print(piece, end="")

A prompt is a text, or a conversation: a list of texts, the user's and the model's in turn. ``<image>`` in a user's text
says where a picture goes; pictures without one come first.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import PictureStore, largest_area, patchify_of
from grace_vlm.data.rows import IMAGE_MARKER, Row, Turn
from grace_vlm.engine.engine import Engine, EngineOptions, Event
from grace_vlm.engine.open import open_model
from grace_vlm.engine.request import EngineImage, Finish, Prompt
from grace_vlm.engine.sampling import Choice, SamplingParams
from grace_vlm.engine.text import TextStream
from grace_vlm.errors import ConfigError, RequestError
from grace_vlm.media.image import ImageFault, ImageSource, take_image
from grace_vlm.models.load import LoadedModel
from grace_vlm.quant.scheme import QuantizedTensor

CPU_PIXELS = 448 * 448
"""A picture's area on a CPU if nothing else is asked: the first token waits for the tower, which takes time by
area (docs/engine.md), and a model's own largest area is some sixteen million pixels."""
_SURROGATE = re.compile("[\ud800-\udfff]")
Picture = ImageSource
TextOrTurns = str | Sequence[str]


@dataclass(frozen=True)
class Parts:
    """A prompt of one turn, texts to the last space as they are given: ``<image>`` in one is no more than its letters.

    Args:
        parts: texts, and pictures as bytes, Pillow's, or a ``Path``.
    """

    parts: tuple[str | Picture, ...]


Pictures = Picture | Sequence[Picture] | None


@dataclass(frozen=True)
class Answer:
    """To one prompt.

    Args:
        token_ids: without the token that ended it. finish: ``stop`` (an end token or a stop text), ``length``.
        num_prompt_tokens: visual ones too. choices: of each token, with log-probabilities if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    num_prompt_tokens: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Asked:
    """A request: a prompt, its pictures and what is asked of the answer. ``id`` is the caller's."""

    id: str
    prompt: TextOrTurns | Parts
    images: Sequence[Picture] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)


class LLM:
    """A model folder, a run folder or a hub id, ready to answer.

    Args:
        model: as ``grace chat`` takes it, or one that is open. device: auto, cpu, cuda or cuda:N. options: sizes of the
            engine. quantized: codes of an open model, by module name; of others they are read.
        max_pixels: area that larger pictures are shrunk to. None: the processor's own, on a CPU at most ``CPU_PIXELS``,
            which is said once when a picture is larger.

    Raises:
        ConfigError: ``max_pixels`` for a processor of fixed size, or less than a picture can have.
    """

    def __init__(
        self,
        model: str | LoadedModel,
        device: str = "auto",
        options: EngineOptions | None = None,
        quantized: Mapping[str, QuantizedTensor] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        if max_pixels is not None and max_pixels < 1:
            raise ConfigError(f"max_pixels is {max_pixels}; expected at least 1, for example {CPU_PIXELS}")
        loaded, codes = (model, quantized) if isinstance(model, LoadedModel) else open_model(model, device)
        self.loaded = loaded
        self.engine = Engine(loaded, codes, options)
        self.tokenizer = loaded.processor.tokenizer
        config = loaded.model.config
        self._encoder = Encoder(loaded.processor, loaded.adapter, config)
        own = largest_area(loaded.processor)
        on_cpu = self.engine.weights.device.type == "cpu"
        self._says_shrunk = on_cpu and max_pixels is None and own is not None and own > CPU_PIXELS
        limit = CPU_PIXELS if self._says_shrunk else max_pixels
        self._patchify = patchify_of(loaded.adapter, config, loaded.processor, max_pixels=limit)
        self._names = (f"r{number}" for number in itertools.count())
        self._open: dict[str, _Open] = {}

    def generate(
        self,
        prompts: str | Sequence[TextOrTurns],
        images: Pictures | Sequence[Pictures] = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Answer]:
        """An answer to each prompt, in order; prompts run together.

        Args:
            prompts: one text, or a list of texts or conversations. images: for one text its pictures, else for
                each prompt its own. sampling: for all, or one each; greedy if left out.

        Raises:
            RequestError: a prompt, a picture or a parameter that cannot be used; nothing has run then.
        """
        many: list[TextOrTurns] = [prompts] if isinstance(prompts, str) else list(prompts)
        pictures = _for_each(images, len(many), is_one=isinstance(prompts, str))
        params = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(many)
        if len(params) != len(many):
            raise RequestError(f"sampling has {len(params)} entries for {len(many)} prompts; give one, or one each")
        made = [self.prompt(text, _listed(own)) for text, own in zip(many, pictures, strict=True)]
        started: list[_Open] = []
        try:
            for prompt, one in zip(made, params, strict=True):
                started.append(self._start(prompt, one))
            while any(one.answer is None for one in started):
                self._turn()
        finally:
            self._forget(started)
        return [one.answer for one in started if one.answer is not None]

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answer | RequestError]]:
        """Each request with its answer, or why it has none, as they end.

        Requests are taken from ``asked`` a few more at a time than run together, so that a million of them, or their
        pictures, need not be in memory.
        """
        source, waiting = iter(asked), True
        under_way: list[tuple[Asked, _Open]] = []
        try:
            while waiting or under_way:
                while waiting and len(under_way) < 2 * self.engine.options.max_running:
                    one = next(source, None)
                    if one is None:
                        waiting = False
                        break
                    try:
                        under_way.append((one, self._start(self.prompt(one.prompt, one.images), one.sampling)))
                    except RequestError as error:
                        yield one, error
                self._turn()
                ended = [pair for pair in under_way if pair[1].answer is not None]
                under_way = [pair for pair in under_way if pair[1].answer is None]
                for one, own in ended:
                    assert own.answer is not None
                    yield one, own.answer
        finally:
            self._forget([own for _, own in under_way])

    def _start(self, prompt: Prompt, params: SamplingParams) -> _Open:
        """Queue a request."""
        own = _Open(next(self._names), TextStream(self.tokenizer, params.stop), len(prompt.ids))
        self.engine.add(own.name, prompt, params)
        self._open[own.name] = own
        return own

    def _turn(self) -> None:
        """One step of the engine. What it says goes to whoever started the request, whoever asked for the step."""
        for event in self.engine.step():
            own = self._open.get(event.request_id)
            if own is not None and own.follow(event):
                self._forget([own])

    def _forget(self, requests: Iterable[_Open]) -> None:
        """Requests that nobody waits for any more; those that run end now."""
        for own in requests:
            self._open.pop(own.name, None)
            self.engine.cancel(own.name)

    def stream(
        self, prompt: TextOrTurns, images: Pictures = None, sampling: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is made; leaving the loop early ends the request."""
        own = self._start(self.prompt(prompt, _listed(images)), sampling or SamplingParams())
        try:
            while own.pieces or own.answer is None:
                if own.pieces:
                    yield own.pieces.pop(0)
                else:
                    self._turn()
        finally:
            self._forget([own])

    def prompt(self, prompt: TextOrTurns | Parts, images: Sequence[Picture] = ()) -> Prompt:
        """Token ids and pixels of a prompt, by the model's own template and image processor.

        Raises:
            RequestError: an empty text, a conversation that does not end with the user, pictures and markers that do
                not agree, or a picture that cannot be used.
        """
        if isinstance(prompt, Parts):
            if images:
                raise RequestError(
                    f"a prompt of parts has its own pictures, and {len(images)} more came; leave those out"
                )
            made = self._pictures([part for part in prompt.parts if not isinstance(part, str)])
            texts: list[str | None] = [part if isinstance(part, str) else None for part in prompt.parts]
            if not any(text and text.strip() for text in texts):
                raise RequestError("a prompt of parts has no words; expected some")
            sample = self._encoder.prompt_of(texts, [image.grid for image in made])
        else:
            row = _row_of(prompt, images)
            made = self._pictures(images)
            sample = self._encoder.prompt(row, [image.grid for image in made])
        return Prompt(sample.input_ids, sample.positions, sample.visual, made)

    def _pictures(self, images: Sequence[Picture]) -> list[EngineImage]:
        store, made = PictureStore(self._patchify), []
        for number, (name, image) in enumerate(zip(_names(images), images, strict=True)):
            try:
                loaded = take_image(image)
                self._say_if_shrunk(name, loaded.image.size)
                picture = store.add(str(number), loaded)
            except ImageFault as fault:
                raise RequestError(f"{name}: {fault.reason}") from None
            assert picture.pixels is not None
            made.append(EngineImage(picture.grid, picture.pixels))
        return made

    def _say_if_shrunk(self, name: str, size: tuple[int, int]) -> None:
        """Once, of the first picture that is larger than a CPU's own limit."""
        if self._says_shrunk and size[0] * size[1] > CPU_PIXELS:
            self._says_shrunk = False
            logging.getLogger("grace_vlm").warning(
                "%s is %d x %d; on a CPU pictures are shrunk to %d pixels, pass max_pixels (--max-pixels) for more",
                *(name, *size, CPU_PIXELS),
            )


@dataclass
class _Open:
    """A request under way: its text so far, pieces of it that nobody has taken yet, and the answer at the end."""

    name: str
    text: TextStream
    num_prompt_tokens: int
    choices: list[Choice] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    answer: Answer | None = None

    def follow(self, event: Event) -> bool:
        """Take what the engine says; whether that was the end, by a token, the length or a stop text."""
        pieces = []
        if event.choice is not None:
            self.choices.append(event.choice)
            pieces.append(self.text.add(event.choice.token))
        if event.finish:
            pieces.append(self.text.close())
        self.pieces += filter(None, pieces)
        if not event.finish and not self.text.stopped:
            return False
        finish: Finish = "stop" if self.text.stopped else event.finish or "stop"
        tokens = tuple(choice.token for choice in self.choices)
        self.answer = Answer(self.text.text, tokens, finish, self.num_prompt_tokens, tuple(self.choices))
        return True


def _names(images: Sequence[Picture]) -> list[str]:
    return [str(one) if isinstance(one, str | Path) else f"picture {n}" for n, one in enumerate(images, start=1)]


def _row_of(prompt: TextOrTurns, images: Sequence[Picture]) -> Row:
    """A conversation as a row of data.

    Raises:
        RequestError: see ``LLM.prompt``.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts or len(texts) % 2 == 0:
        raise RequestError(f"a conversation has {len(texts)} texts; expected an odd number, the user's last")
    if empty := [number for number, text in enumerate(texts) if not text.replace(IMAGE_MARKER, "").strip()]:
        raise RequestError(f"text {empty[0] + 1} of the prompt is empty; expected words")
    for number, text in enumerate(texts, start=1):
        if not text.isascii() and _SURROGATE.search(text):
            raise RequestError(f"text {number} of the prompt has half of a surrogate pair; expected whole characters")
    texts = _marked(texts, len(images))
    turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    return Row(0, "prompt", tuple(_names(images)), (*turns, Turn("assistant", "")))


def _listed(images: Pictures) -> list[Picture]:
    """The pictures of one prompt; ``RequestError`` for what is none."""
    if images is None:
        return []
    if isinstance(images, Picture):
        return [images]
    if not isinstance(images, Sequence) or not all(isinstance(one, Picture) for one in images):
        raise _no_picture(images)
    return list(images)  # type: ignore[arg-type]


def _no_picture(images: object) -> RequestError:
    found = images if not isinstance(images, Sequence) else next(o for o in images if not isinstance(o, Picture))
    return RequestError(
        f"images has {str(found)[:80]!r} ({type(found).__name__}); expected a path, bytes or a Pillow image, or a list "
        "of them"
    )


def _for_each(images: Pictures | Sequence[Pictures], count: int, is_one: bool) -> list[Pictures]:
    """The pictures of each prompt."""
    if images is None:
        return [None] * count
    if is_one:
        return [_listed(images)]  # type: ignore[arg-type]
    if not isinstance(images, Picture | Sequence):
        raise _no_picture(images)
    each: list[Pictures] = [images] if isinstance(images, Picture) else list(images)
    if len(each) != count:
        raise RequestError(f"images has {len(each)} entries for {count} prompts; give each its own, None for none")
    return each


def _marked(texts: list[str], num_images: int) -> list[str]:
    """Texts with a marker for each picture; where there is none at all, the first text begins with them."""
    markers = sum(text.count(IMAGE_MARKER) for text in texts[::2])
    if any(IMAGE_MARKER in text for text in texts[1::2]):
        raise RequestError(f"an answer in the conversation has {IMAGE_MARKER}; pictures stand in the user's texts")
    if not markers:
        return [f"{IMAGE_MARKER}\n" * num_images + texts[0], *texts[1:]]
    if markers != num_images:
        raise RequestError(
            f"the prompt has {markers} times {IMAGE_MARKER} and {num_images} pictures; give one for each"
        )
    return texts
