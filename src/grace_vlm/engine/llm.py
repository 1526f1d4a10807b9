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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.rows import IMAGE_MARKER, Row, Turn
from grace_vlm.engine.engine import Engine, EngineOptions, Event
from grace_vlm.engine.request import EngineImage, Finish, Prompt
from grace_vlm.engine.sampling import Choice, SamplingParams
from grace_vlm.engine.text import TextStream
from grace_vlm.errors import RequestError
from grace_vlm.formats.folder import GRID, read_grid
from grace_vlm.media.image import ImageFault, load_image
from grace_vlm.models.load import LoadedModel, load_model

TextOrTurns = str | Sequence[str]
Picture = str | Path
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


class LLM:
    """A model folder, a run folder or a hub id, ready to answer.

    Args:
        model: as ``grace chat`` takes it. device: auto, cpu, cuda or cuda:N. options: sizes of the engine.
    """

    def __init__(self, model: str | LoadedModel, device: str = "auto", options: EngineOptions | None = None) -> None:
        loaded = model if isinstance(model, LoadedModel) else load_model(model, device)
        folder = Path(loaded.path)
        self.loaded = loaded
        self.engine = Engine(loaded, read_grid(folder) if (folder / GRID).is_dir() else None, options)
        self.tokenizer = loaded.processor.tokenizer
        config = loaded.model.config
        self._encoder = Encoder(loaded.processor, loaded.adapter, config)
        self._patchify = patchify_of(loaded.adapter, config, loaded.processor)
        self._names = (f"r{number}" for number in itertools.count())

    def generate(
        self,
        prompts: str | Sequence[TextOrTurns],
        images: Pictures | Sequence[Pictures] = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Answer]:
        """An answer to each prompt, in order; prompts run together.

        Args:
            prompts: one text, or a list of texts or conversations. images: for one text its pictures' paths, else for
                each prompt its own. sampling: for all, or one each; greedy if left out.

        Raises:
            RequestError: a prompt, a picture or a parameter that cannot be used; nothing has run then.
        """
        many: list[TextOrTurns] = [prompts] if isinstance(prompts, str) else list(prompts)
        pictures = _for_each(images, len(many), "images", is_one=isinstance(prompts, str))
        params = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(many)
        if len(params) != len(many):
            raise RequestError(f"sampling has {len(params)} entries for {len(many)} prompts; give one, or one each")
        made = [self.prompt(text, _listed(own)) for text, own in zip(many, pictures, strict=True)]
        names = [next(self._names) for _ in made]
        streams = {name: TextStream(self.tokenizer, one.stop) for name, one in zip(names, params, strict=True)}
        choices: dict[str, list[Choice]] = {name: [] for name in names}
        finishes: dict[str, Finish] = {}
        try:
            for name, prompt, one in zip(names, made, params, strict=True):
                self.engine.add(name, prompt, one)
            while len(finishes) < len(names):
                for event in self.engine.step():
                    self._follow(event, streams, choices, finishes)
        finally:
            for name in names:
                self.engine.cancel(name)
        return [
            Answer(
                streams[name].text,
                tuple(choice.token for choice in choices[name]),
                finishes[name],
                len(prompt.ids),
                tuple(choices[name]),
            )
            for name, prompt in zip(names, made, strict=True)
        ]

    def stream(
        self, prompt: TextOrTurns, images: Pictures = None, sampling: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is made; leaving the loop early ends the request."""
        name, params = next(self._names), sampling or SamplingParams()
        text = TextStream(self.tokenizer, params.stop)
        self.engine.add(name, self.prompt(prompt, _listed(images)), params)
        try:
            while True:
                for event in self.engine.step():
                    if event.request_id != name:
                        continue
                    if event.choice is not None and (piece := text.add(event.choice.token)):
                        yield piece
                    if event.finish or text.stopped:
                        if rest := text.close():
                            yield rest
                        return
        finally:
            self.engine.cancel(name)

    def prompt(self, prompt: TextOrTurns, images: Sequence[Picture] = ()) -> Prompt:
        """Token ids and pixels of a prompt, by the model's own template and image processor.

        Raises:
            RequestError: an empty text, a conversation that does not end with the user, pictures and markers that do
                not agree, or a picture that cannot be used.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts or len(texts) % 2 == 0:
            raise RequestError(f"a conversation has {len(texts)} texts; expected an odd number, the user's last")
        if empty := [number for number, text in enumerate(texts) if not text.replace(IMAGE_MARKER, "").strip()]:
            raise RequestError(f"text {empty[0] + 1} of the prompt is empty; expected words")
        texts = _marked(texts, len(images))
        turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
        row = Row(0, "prompt", tuple(str(image) for image in images), (*turns, Turn("assistant", "")))
        store, made = PictureStore(self._patchify), []
        for number, image in enumerate(images):
            try:
                picture = store.add(str(number), load_image(Path(image)))
            except ImageFault as fault:
                raise RequestError(f"{image}: {fault.reason}") from None
            assert picture.pixels is not None
            made.append(EngineImage(picture.grid, picture.pixels))
        sample = self._encoder.prompt(row, [image.grid for image in made])
        return Prompt(sample.input_ids, sample.positions, sample.visual, made)

    def _follow(
        self,
        event: Event,
        streams: dict[str, TextStream],
        choices: dict[str, list[Choice]],
        finishes: dict[str, Finish],
    ) -> None:
        name = event.request_id
        if name not in streams or name in finishes:
            return
        stream = streams[name]
        if event.choice is not None:
            choices[name].append(event.choice)
            stream.add(event.choice.token)
        if event.finish:
            finishes[name] = event.finish
            stream.close()
        if stream.stopped:
            finishes[name] = "stop"
            self.engine.cancel(name)


def _listed(images: Pictures) -> list[Picture]:
    if images is None:
        return []
    return [images] if isinstance(images, str | Path) else list(images)


def _for_each(images: Pictures | Sequence[Pictures], count: int, what: str, is_one: bool) -> list[Pictures]:
    """The pictures of each prompt."""
    if images is None:
        return [None] * count
    if is_one:
        return [_listed(images)]  # type: ignore[arg-type]
    each: list[Pictures] = [images] if isinstance(images, str | Path) else list(images)
    if len(each) != count:
        raise RequestError(f"{what} has {len(each)} entries for {count} prompts; give each its own, None for none")
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
