"""Answers of a JSON schema: before each choice, which tokens can still become such a document.

llguidance follows the document byte by byte and knows the vocabulary as a tree of bytes; a mask of 152,000 tokens takes
it tens of microseconds. It is an optional package, asked for when the first request has a schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from grace_vlm.errors import ConfigError, RequestError


class Guide:
    """Of one request: what it may say next."""

    def __init__(self, matcher: Any, num_words: int) -> None:
        self._matcher, self._num_words = matcher, num_words

    def allowed(self) -> torch.Tensor:
        """(V,) bool on the host; at the end of the document only what ends an answer."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._num_words].astype(bool))

    def accept(self, token: int) -> None:
        """The token was chosen."""
        self._matcher.consume_token(token)


class Guides:
    """Of one tokenizer.

    Args:
        num_words: rows of the head. end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, num_words: int, end_ids: Iterable[int]) -> None:
        self._tokenizer, self._num_words, self._end_ids = tokenizer, num_words, sorted(end_ids)
        self._known: Any = None

    def of_schema(self, schema: str) -> Guide:
        """Of a JSON schema as text.

        Raises:
            ConfigError: llguidance is not installed. RequestError: the schema is none, or more than it can follow.
        """
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise ConfigError("json_schema needs llguidance; pip install llguidance") from None
        if self._known is None:
            self._known = llguidance.hf.from_tokenizer(self._tokenizer, self._num_words, self._end_ids)
        try:
            # White space wherever JSON allows it would let a model write nothing else until its last token.
            matcher = llguidance.LLMatcher
            grammar = matcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
            wrong = matcher.validate_grammar(grammar, self._known)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise RequestError(f"json_schema cannot be followed: {' '.join(wrong.split())}")
        return Guide(matcher(self._known, grammar), self._num_words)
