"""What the Qwen-VL families share: pictures in patches on a grid, and positions on three axes (M-RoPE).

Transformers 5.17 and 5.23 attend picture by picture in a Python loop under SDPA. Pictures of one grid need no loop:
they are one batch for the attention. ``run_equal_grids`` says so through an attention function of ours and one
"sequence" that holds all of them. The positions of a grid are made once and repeated: the stock towers make them
picture by picture, some thirty small operations each, which on a GPU is most of a small step. Everything else is the
stock tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from grace_vlm.kernels.upload import upload
from grace_vlm.models.adapter import Grid, TowerOutput
from grace_vlm.models.decoder import attention

_EQUAL_GRIDS = "grace_equal_grids"
Tables = dict[str, torch.Tensor]
"""What a stock tower derives from one grid, by the keyword that takes it ready-made; first axis: patches."""


def attend_equal_grids(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """SDPA over (1, heads, pictures * patches, d) as a batch of ``num_pictures`` (1: a stock call, one by one)."""
    num_pictures: int = kwargs.get("num_pictures", 1)
    heads, total, dim = query.shape[1:]

    def by_picture(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(heads, num_pictures, total // num_pictures, dim).transpose(0, 1)

    out = F.scaled_dot_product_attention(by_picture(query), by_picture(key), by_picture(value), scale=kwargs["scaling"])
    return out.permute(0, 2, 1, 3).reshape(1, total, heads, dim), None


def run_equal_grids(
    visual: Any,
    pixels: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    tables_of: Callable[[Grid], Tables],
) -> list[TowerOutput]:
    """The stock tower ``visual`` over pictures, grouped by grid; one output a picture, in order."""
    weight = visual.patch_embed.proj.weight
    outputs: dict[int, TowerOutput] = {}
    with attention(visual, _EQUAL_GRIDS, attend_equal_grids):
        for grid in sorted(set(grids)):
            members = [i for i, other in enumerate(grids) if other == grid]
            patches = torch.cat([upload(pixels[i], weight.device) for i in members]).to(weight.dtype)
            state = visual(
                patches,
                grid_thw=torch.tensor([grid] * len(members)),
                cu_seqlens=torch.tensor([0, patches.shape[0]], dtype=torch.int32),
                num_pictures=len(members) * grid[0],
                **{name: table.repeat(len(members), 1) for name, table in tables_of(grid).items()},
            )
            hidden = state.last_hidden_state.chunk(len(members))
            deepstack = [layer.chunk(len(members)) for layer in getattr(state, "deepstack_features", None) or ()]
            for j, i in enumerate(members):
                outputs[i] = TowerOutput(hidden[j], tuple(layer[j] for layer in deepstack))
    return [outputs[i] for i in range(len(grids))]


def mrope_positions(image_token_id: int, merge: int, input_ids: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """(3, S): text counts on all three axes; a picture counts t, h, w from where it starts, and the text after it goes
    on from its longest side. ``merge``: patches of a visual token along one side."""
    is_visual = input_ids == image_token_id
    out = np.empty((3, len(input_ids)), dtype=np.int64)
    at, position = 0, 0
    for t, h, w in grids:
        start = at + int(np.argmax(is_visual[at:]))
        out[:, at:start] = np.arange(position, position + start - at)
        position += start - at
        axes = np.meshgrid(np.arange(t), np.arange(h // merge), np.arange(w // merge), indexing="ij")
        at = start + axes[0].size
        out[:, start:at] = np.stack([axis.reshape(-1) for axis in axes]) + position
        position += max(h, w) // merge
    out[:, at:] = np.arange(position, position + len(input_ids) - at)
    return out


def patchify_grids(image_processor: Any, images: Sequence[Any]) -> list[tuple[Grid, torch.Tensor]]:
    """(grid, (n_patches, patch_dim) FP32) of each picture; one call of the processor, which stacks equal sizes."""
    features = image_processor(images=list(images), return_tensors="pt")
    grids = [(t, h, w) for t, h, w in features["image_grid_thw"].tolist()]
    parts = features["pixel_values"].split([t * h * w for t, h, w in grids])
    # A part of a stacked tensor would keep all of it alive.
    return [(grid, part.clone()) for grid, part in zip(grids, parts, strict=True)]
