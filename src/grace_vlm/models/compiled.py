"""Layers of a model compiled one by one.

A decoder of 28 equal layers is 28 calls of one compiled function: it is compiled once, in the time of one layer, for
any number of tokens (``dynamic``). A layer of a Qwen decoder is some forty launches forward in eager PyTorch and a
dozen compiled, and a step of small micro-batches is made of launches; norms, rotations and SwiGLU also pass memory
once instead of five times. What is not a layer (loss, optimizer, towers with a picture's own shape) stays as it is.
"""

from __future__ import annotations

from typing import Any


def compile_layers(model: Any) -> None:
    """Compile the decoder layers of a vision-language model, in place; the work is done when they are first called."""
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)
