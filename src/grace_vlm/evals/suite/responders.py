"""Who answers: our engine, Transformers' own ``generate``, or a server with OpenAI's interface.

All are greedy, and given the same texts and pictures. What one cannot answer comes back as a ``Reply`` with an error.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from grace_vlm.engine.llm import LLM, Answer, Asked, Parts
from grace_vlm.engine.sampling import SamplingParams
from grace_vlm.errors import ConfigError, DataError, GraceError, RequestError
from grace_vlm.evals.suite.ledger import Reply
from grace_vlm.evals.suite.questions import Question, picture_bytes, text_hash
from grace_vlm.media.image import ImageFault, take_image


class Responder(Protocol):
    """Answers questions, in any order, as they end; it takes them from ``questions`` as it can use them."""

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]: ...


@dataclass(frozen=True)
class Opened:
    """A question with its pictures' bytes, and what is kept of both."""

    question: Question
    pictures: tuple[bytes, ...]
    started: float

    def reply(self, text: str | None, finish: str | None, error: str | None, tokens: tuple[int, int] | None) -> Reply:
        one = self.question
        pictures = tuple(hashlib.sha256(data).hexdigest() for data in self.pictures)
        seconds = round(time.perf_counter() - self.started, 4)
        return Reply(one.key, one.task, one.doc_id, text, finish, error, text_hash(one), pictures, tokens, seconds)

    def parts(self) -> tuple[str | bytes, ...]:
        pictures = iter(self.pictures)
        return tuple(part if isinstance(part, str) else next(pictures) for part in self.question.parts)


def opened(question: Question) -> Opened | Reply:
    """A question ready to be asked, or the reply that says which picture cannot be had."""
    started = time.perf_counter()
    try:
        return Opened(question, tuple(picture_bytes(question)), started)
    except DataError as error:
        return Opened(question, (), started).reply(None, None, str(error), None)


class EngineResponder:
    """Our engine, as many questions together as it runs."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        asked: dict[str, Opened] = {}
        failed: list[Reply] = []

        def requests() -> Iterator[Asked]:
            for question in questions:
                one = opened(question)
                if isinstance(one, Reply):
                    failed.append(one)
                    continue
                asked[question.key] = one
                yield Asked(question.key, Parts(one.parts()), (), SamplingParams(question.max_new_tokens))

        for request, answer in self.llm.answers(requests()):
            one = asked.pop(request.id)
            if isinstance(answer, RequestError):
                yield one.reply(None, None, str(answer), None)
            else:
                yield one.reply(answer.text, answer.finish, None, _counts(answer))
            while failed:
                yield failed.pop()
        yield from failed


def _counts(answer: Answer) -> tuple[int, int]:
    return answer.num_prompt_tokens, len(answer.token_ids)


class TransformersResponder:
    """Transformers' ``generate`` in left-padded batches: what others' harnesses do.

    Args:
        loaded: a model and its processor, as ``models.load`` opens them.
    """

    def __init__(self, loaded: Any, batch_size: int) -> None:
        self.loaded, self.batch_size = loaded, batch_size

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        source = iter(questions)
        while batch := list(itertools.islice(source, self.batch_size)):
            by_budget: dict[int, list[Opened]] = {}
            for question in batch:
                one = opened(question)
                if isinstance(one, Reply):
                    yield one
                else:
                    by_budget.setdefault(question.max_new_tokens, []).append(one)
            for budget, own in by_budget.items():
                yield from self._batch(own, budget)

    def _batch(self, batch: list[Opened], budget: int) -> Iterator[Reply]:
        import torch

        processor, model = self.loaded.processor, self.loaded.model
        texts, images, ready = [], [], []
        for one in batch:
            try:
                pictures = [take_image(data).image for data in one.pictures]
            except ImageFault as fault:
                yield one.reply(None, None, fault.reason, None)
                continue
            content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in one.parts()]
            message = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
            images += pictures
            ready.append(one)
        if not ready:
            return
        processor.tokenizer.padding_side = "left"
        inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        inputs = inputs.to(next(model.parameters()).device)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=budget, do_sample=False)
        width = inputs["input_ids"].shape[1]
        for one, line in zip(ready, out[:, width:], strict=True):
            text = processor.tokenizer.decode(line, skip_special_tokens=True)
            yield one.reply(text, None, None, None)


class EndpointResponder:
    """A server with ``/chat/completions``: vLLM, SGLang, llama.cpp, ours.

    Args:
        url: up to ``/v1``. model: as the server calls it. key: sent as a bearer token. together: requests at a time.
        tries: of one request, where the server is busy or out of reach; one it refuses is not tried again.
    """

    def __init__(
        self, url: str, model: str, key: str | None = None, together: int = 16, tries: int = 4, seconds: float = 600.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--endpoint is {url}; expected a URL such as http://localhost:8000/v1")
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.together, self.tries, self.seconds = together, tries, seconds

    def answers(self, questions: Iterable[Question]) -> Iterator[Reply]:
        source = iter(questions)
        running: set[Future[Reply]] = set()
        with ThreadPoolExecutor(self.together) as pool:
            for question in itertools.islice(source, self.together):
                running.add(pool.submit(self._ask, question))
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for question in itertools.islice(source, len(ended)):
                    running.add(pool.submit(self._ask, question))
                for one in ended:
                    yield one.result()

    def _ask(self, question: Question) -> Reply:
        one = opened(question)
        if isinstance(one, Reply):
            return one
        try:
            for data in one.pictures:
                take_image(data)  # what is no picture here would be the server's to judge
        except ImageFault as fault:
            return one.reply(None, None, fault.reason, None)
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part)}}
            for part in one.parts()
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_new_tokens,
            "temperature": 0,
        }
        try:
            said = self._post(json.dumps(body).encode())
            choice, usage = said["choices"][0], said.get("usage") or {}
            counts = (int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if usage else None
            return one.reply(choice["message"]["content"] or "", choice.get("finish_reason"), None, counts)
        except (GraceError, KeyError, IndexError, TypeError, ValueError) as error:
            return one.reply(None, None, f"{type(error).__name__}: {error}"[:300], None)

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        for turn in range(self.tries):
            request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                    said = answer.read()
                try:
                    return json.loads(said)
                except ValueError:
                    raise RequestError(
                        f"{self.url} answers with no JSON: {said[:80]!r}; is it a /v1 of OpenAI's?"
                    ) from None
            except urllib.error.HTTPError as error:
                why = error.read()[:200].decode(errors="replace")
                if error.code not in (408, 429, 500, 502, 503, 504) or turn == self.tries - 1:
                    raise RequestError(f"{self.url} says {error.code}: {why}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if turn == self.tries - 1:
                    raise RequestError(f"{self.url} cannot be reached: {error}; is the server running?") from None
            time.sleep(0.5 * 2**turn)
        raise AssertionError("the last try returns or raises")


def data_url(data: bytes) -> str:
    """A picture's bytes as OpenAI's interface takes them."""
    kind = next((kind for kind, magic in _MAGIC.items() if data.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


_MAGIC = {"jpeg": b"\xff\xd8", "png": b"\x89PNG", "gif": b"GIF8", "webp": b"RIFF"}
