"""ahead: the same values in order, one loaded beforehand, errors where they belong."""

from __future__ import annotations

import threading

import pytest

from grace_vlm.formats.lazy import Lazy, ahead


def test_values_come_in_order_and_at_most_one_is_loaded_beforehand() -> None:
    loaded: list[str] = []

    def load(name: str) -> int:
        loaded.append(name)
        return int(name)

    names = [str(number) for number in range(20)]
    for number, (name, value) in enumerate(ahead(Lazy(names, load))):
        assert (name, value) == (str(number), number)
        assert len(loaded) <= number + 2
    assert loaded == names
    assert [name for name, _ in ahead(Lazy(names, load), ["7", "3"])] == ["7", "3"]
    assert list(ahead(Lazy([], load))) == []


def test_an_error_comes_at_its_own_turn() -> None:
    def load(name: str) -> str:
        if name == "c":
            raise ValueError("c is broken")
        return name

    pairs = ahead(Lazy("abcd", load))
    assert [next(pairs)[0], next(pairs)[0]] == ["a", "b"]
    with pytest.raises(ValueError, match="c is broken"):
        next(pairs)


def test_leaving_early_leaves_no_thread() -> None:
    before = threading.active_count()
    for name, _ in ahead(Lazy("abcd", str)):
        if name == "b":
            break
    assert threading.active_count() == before
