"""An answer's text as its tokens come, and where it ends by a text.

Tokens are bytes of words: a character may need several, and what a word looks like may depend on the one before. So the
text of the last few tokens is made twice, without and with the new one, and what is new is given out once no character
in it is half there. Up to the length of the longest stop text is held back, for it might begin there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"


class TextStream:
    """Text of one answer.

    Args:
        tokenizer: Transformers'. stop: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self._held_back = max((len(text) for text in self.stop), default=1) - 1
        self._ids: list[int] = []
        self._settled = self._shown = 0
        self._text, self._given = "", 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All of it that is whole, without a stop text and what follows."""
        return self._text

    def add(self, token: int) -> str:
        """What can be given out after one more token; nothing after the end."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before, now = (self._decoded(self._settled, end) for end in (self._shown, len(self._ids)))
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            self._text += now[len(before) :]
            self._settled, self._shown = self._shown, len(self._ids)
            self._look_for_stop()
        return self._give(0 if self.stopped else self._held_back)

    def close(self) -> str:
        """What was held back, at the end; half a character becomes the replacement character."""
        if not self.stopped:
            before, now = (self._decoded(self._settled, end) for end in (self._shown, len(self._ids)))
            self._text += now[len(before) :]
            self._look_for_stop()
        return self._give(0)

    def _look_for_stop(self) -> None:
        places = [place for text in self.stop if (place := self._text.find(text)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True

    def _give(self, held_back: int) -> str:
        end = max(self._given, len(self._text) - held_back)
        given, self._given = self._text[self._given : end], end
        return given

    def _decoded(self, first: int, end: int) -> str:
        text: str = self.tokenizer.decode(self._ids[first:end], skip_special_tokens=True)
        return text
