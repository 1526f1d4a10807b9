"""Speculation by looking up the prompt: several tokens of an answer from one forward.

A request that is decoded greedily is given a draft of its next tokens (``lookup.py``). They run behind its missing
token in one forward, as a piece of a prompt does, and every row says what the model chooses after it:

    rows      t   d1  d2  d3  d4      t: missing, d: draft
    choices   d1  d2  x   .   .       d1 and d2 are what the model chooses itself; x is the choice after them

The answer goes on with ``d1 d2 x``: what it would be without drafts, for each token was chosen after the same ones.
With no token right it still goes on by one, so a draft costs no step, only a longer one.
"""

from __future__ import annotations

from collections.abc import Sequence

from grace_vlm.engine.lookup import Lookup
from grace_vlm.engine.request import Request


class Drafter:
    """Makes drafts, and counts them.

    Args:
        most: tokens of a draft; 0: none are made.

    ``num_proposed``: tokens of all drafts. ``num_accepted``: those that became an answer's.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_proposed = self.num_accepted = 0

    def drafts(self, requests: Sequence[Request], budget: int) -> list[list[int]]:
        """For each request, which has one token missing; together at most ``budget`` tokens."""
        found = []
        for request in requests:
            draft = self._draft(request, min(self.most, budget))
            budget -= len(draft)
            found.append(draft)
        return found

    def _draft(self, request: Request, most: int) -> list[int]:
        # What the model chooses behind the draft is of the answer too, and the answer's last token never runs: so a
        # draft ends where the request's pages do.
        count = min(most, request.params.max_tokens - len(request.chooser.answer) - 1)
        if count <= 0 or not request.chooser.is_greedy:
            return []
        if request.lookup is None:
            request.lookup = Lookup(request.chooser.prompt)
        request.lookup.extend(request.chooser.answer[request.lookup.num_tokens - request.num_prompt :])
        return request.lookup.draft(count)

    def count(self, draft: Sequence[int], num_accepted: int) -> None:
        """A draft was run, and so many of its tokens were taken."""
        self.num_proposed += len(draft)
        self.num_accepted += num_accepted


def num_right(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens of a draft are what the model chose, up to the first that is not.

    Args:
        chosen: one more than the draft has; the i-th is the choice where the draft's i-th token stands.
    """
    pairs = zip(draft, chosen, strict=False)
    return next((place for place, (token, choice) in enumerate(pairs) if token != choice), len(draft))
