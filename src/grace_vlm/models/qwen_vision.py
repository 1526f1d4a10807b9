"""What the Qwen-VL families share: pictures in patches on a grid, and positions on three axes (M-RoPE).

Transformers 5.17 and 5.23 attend picture by picture in a Python loop under SDPA. ``run_grids`` gives the stock tower
one "sequence" of many pictures and an attention function of ours that keeps them apart: pictures of one size are a
batch of SDPA, others go through one kernel that knows their borders (a GPU in BF16), or size by size (elsewhere). What
a tower derives from a grid is made once for each grid and put end to end: the stock towers make it picture by picture,
some thirty small operations each, which on a GPU is most of a small step. Everything else is the stock tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from grace_vlm.kernels.upload import upload_cat
from grace_vlm.models.adapter import Grid, TowerOutput
from grace_vlm.models.decoder import attend_varlen, attention, borders_of, has_varlen

_FRAMES = "grace_frames"
Tables = dict[str, torch.Tensor]
"""What a stock tower derives from one grid, by the keyword that takes it ready-made; first axis: patches."""


def attend_frames(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    scaling: float,
    num_frames: int = 1,
    borders: torch.Tensor | None = None,
    longest: int = 0,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside each frame of (1, heads, patches, d): ``num_frames`` of one size, or as ``borders`` say.

    One frame is a stock call for one picture.
    """
    if borders is not None:
        return attend_varlen(query, key, value, scaling, borders, longest, {}), None
    heads, total, dim = query.shape[1:]

    def by_frame(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(heads, num_frames, total // num_frames, dim).transpose(0, 1)

    out = F.scaled_dot_product_attention(by_frame(query), by_frame(key), by_frame(value), scale=scaling)
    return out.permute(0, 2, 1, 3).reshape(1, total, heads, dim), None


def run_grids(
    visual: Any,
    pixels: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    tables_of: Callable[[Grid], Tables],
) -> list[TowerOutput]:
    """The stock tower ``visual`` over pictures of any sizes; one output a picture, in order."""
    weight = visual.patch_embed.proj.weight
    outputs: dict[int, TowerOutput] = {}
    with attention(visual, _FRAMES, attend_frames):
        for members in _together(grids, weight):
            patches = upload_cat([pixels[i] for i in members], weight.device).to(weight.dtype)
            own = [grids[i] for i in members]
            tables = [tables_of(grid) for grid in own]
            state = visual(
                patches,
                grid_thw=torch.tensor(own),
                cu_seqlens=torch.tensor([0, patches.shape[0]], dtype=torch.int32),
                **_frame_arguments(own, weight.device),
                **{name: torch.cat([table[name] for table in tables]) for name in tables[0]},
            )
            sizes = [t * h * w for t, h, w in own]
            hidden = state.last_hidden_state.split(sizes)
            deepstack = [
                layer.split([size * len(layer) // patches.shape[0] for size in sizes])
                for layer in getattr(state, "deepstack_features", None) or ()
            ]
            for j, i in enumerate(members):
                outputs[i] = TowerOutput(hidden[j], tuple(layer[j] for layer in deepstack))
    return [outputs[i] for i in range(len(grids))]


def _together(grids: Sequence[Grid], weight: torch.Tensor) -> list[list[int]]:
    """Pictures, by their place, that one call takes: all, or where no kernel knows borders those of one grid."""
    if has_varlen(weight):
        return [list(range(len(grids)))]
    return [[i for i, other in enumerate(grids) if other == grid] for grid in sorted(set(grids))]


def _frame_arguments(grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
    """What the attention is told: how many frames of one size there are, or the borders of frames of several."""
    frames = [h * w for t, h, w in grids for _ in range(t)]
    if len(set(frames)) == 1:
        return {"num_frames": len(frames)}
    return {"borders": borders_of(frames, device), "longest": max(frames)}


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
