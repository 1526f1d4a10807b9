"""Dotted keys of a recipe: ``optim.learning_rate=1e-4`` on a command line, and what someone may have meant."""

from __future__ import annotations

import difflib
from typing import Any

import yaml

from grace_vlm.errors import ConfigError


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``section.key`` in the mapping of a recipe, whose sections are made where they are missing."""
    *parents, last = dotted.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {dotted}: {name} is a value, not a section")
    tree[last] = value


def parse_value(text: str) -> Any:
    """What an override's text means in YAML."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override value {text!r} is not YAML") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-5 as a string
        except ValueError:
            return value
    return value


def nearest_key(model: Any, key: str) -> str | None:
    """The dotted key of a pydantic model that is most like ``key``, which is none; None if its section is unknown or
    nothing there is like it."""
    *sections, last = key.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return None
        model = field.annotation
    near = difflib.get_close_matches(last, model.model_fields, n=1)
    return ".".join([*sections, near[0]]) if near else None
