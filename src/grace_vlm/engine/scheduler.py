"""Which requests run, and how many tokens of each in a step.

Requests are admitted in the order they came, each when the pages for its longest answer are free; a smaller one behind
it waits too, so that none waits for ever. Admitted requests are never put back. Prompts and answers take turns: a step
has a token of each answer, which is the forward that is recorded, or prompts, in pieces if they are longer than a step.

With a ``piece``, a prompt is always cut at the same places: what a request's tokens run with then has nothing to do
with what runs beside it.
"""

from __future__ import annotations

from collections import deque

from grace_vlm.engine.cache import PAGE_TOKENS, Pages, pages_for
from grace_vlm.engine.request import Request
from grace_vlm.errors import RequestError


class Scheduler:
    """Requests that wait and run.

    Args:
        pages: of the cache. max_running: requests at a time. max_step_tokens: of one forward.
        max_model_tokens: that a model's positions allow. piece: tokens of a prompt at a time; None: as many as fit.
    """

    def __init__(
        self, pages: Pages, max_running: int, max_step_tokens: int, max_model_tokens: int, piece: int | None = None
    ) -> None:
        assert max_step_tokens >= max(max_running, piece or 0)
        self.piece = piece
        self._has_read = False
        self.pages, self.max_running = pages, max_running
        self.max_step_tokens, self.max_model_tokens = max_step_tokens, max_model_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """To the end of the queue; ``RequestError`` if it could not run even alone."""
        total = request.num_prompt + request.params.max_tokens
        if total > self.max_model_tokens:
            raise RequestError(
                f"request {request.id} has a prompt of {request.num_prompt:,} tokens and max_tokens "
                f"{request.params.max_tokens:,}; the model takes {self.max_model_tokens:,} in all: shorten one of them"
            )
        needed = pages_for(request.most_tokens)
        if needed > self.pages.num_pages:
            raise RequestError(
                f"request {request.id} needs room for {request.most_tokens:,} tokens and the cache has "
                f"{self.pages.num_pages * PAGE_TOKENS:,}: shorten prompt or max_tokens, or give the cache more"
            )
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Requests that begin now, with their pages."""
        admitted = []
        while self.waiting and len(self.running) < self.max_running:
            pages = self.pages.take(pages_for(self.waiting[0].most_tokens))
            if pages is None:
                break
            request = self.waiting.popleft()
            request.pages = pages
            self.running.append(request)
            admitted.append(request)
        return admitted

    def could_admit(self) -> bool:
        """Whether a request would begin now."""
        if not self.waiting or len(self.running) == self.max_running:
            return False
        return pages_for(self.waiting[0].most_tokens) <= self.pages.num_free

    def plan(self) -> list[tuple[Request, int]]:
        """(request, number of its tokens) of the next step: of prompts alone, or of answers alone."""
        planned, budget = [], self.max_step_tokens
        reading = [request for request in self.running if request.is_reading]
        answering = [request for request in self.running if not request.is_reading]
        if answering and reading:
            # In turns, so that neither waits for the other to end.
            self._has_read = not self._has_read
            answering, reading = ([], reading) if self._has_read else (answering, [])
        for request in (*answering, *reading):
            count = min(request.num_missing, budget if self.piece is None else self.piece)
            if 0 < count <= budget:
                planned.append((request, count))
                budget -= count
        return planned

    def remove(self, request: Request) -> None:
        """A request that has ended, wherever it was; its pages are free."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pages.give(request.pages)
        request.features = None
