"""Greedy answers for a batch of prompts, on any model an adapter knows.

The pictures of a prompt enter once; afterwards each step feeds one token a row. Rows are padded on the left, so that
all of them end together. The same function evaluates every folder, trained, baked or packed, which is what makes
their answers comparable one by one.
"""

from __future__ import annotations

import torch

from grace_vlm.data.collate import Batch
from grace_vlm.models.load import LoadedModel, end_ids
from grace_vlm.models.vision import VisionFeatures


@torch.inference_mode()
def greedy(
    loaded: LoadedModel, vision: VisionFeatures, batch: Batch, max_new_tokens: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy continuation of left-padded prompts.

    Returns:
        (new token ids of each row without the closing token, (B, V) FP32 logits of the first new token).
    """
    from transformers import DynamicCache

    device = next(loaded.model.parameters()).device
    local = batch.to(device)
    assert local.attention_mask is not None, "generation pads on the left"
    adapter, cache = loaded.adapter, DynamicCache()
    stop_ids = torch.tensor(sorted(end_ids(loaded)), device=device)
    mask = local.attention_mask
    vision_outputs = vision.of(batch.pictures)
    states = adapter.decode(
        loaded.model, local.input_ids, local.position_ids, vision_outputs, attention_mask=mask, cache=cache
    )
    logits = adapter.head(loaded.model)(states.last[:, -1]).float()
    first_logits = logits
    position = local.position_ids[:, :, -1:].amax(dim=0, keepdim=True).expand(3, -1, -1)
    finished = torch.zeros(mask.shape[0], dtype=torch.bool, device=device)
    columns = []
    for _ in range(max_new_tokens):
        token = logits.argmax(dim=-1)
        finished = finished | torch.isin(token, stop_ids)
        columns.append(torch.where(finished, -1, token))
        if bool(finished.all()) or len(columns) == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        position = position + 1
        states = adapter.decode(loaded.model, token.unsqueeze(1), position, [], attention_mask=mask, cache=cache)
        logits = adapter.head(loaded.model)(states.last[:, -1]).float()
    table = torch.stack(columns, dim=1).tolist()
    return [[token for token in row if token >= 0] for row in table], first_logits
