"""The online teacher: a frozen model in BF16 that turns micro-batches into ``TeacherSignal``s."""

from __future__ import annotations

import torch

from grace_vlm.data.collate import Batch
from grace_vlm.losses.objective import Objective
from grace_vlm.losses.signal import TeacherSignal
from grace_vlm.models.adapter import plain_head
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.vision import VisionFeatures


class OnlineTeacher:
    """Runs the teacher in the process of the student.

    Args:
        loaded: the teacher, on its device.
        relational_layer: the tapped index of ``hidden_states``.
        tower_cache_bytes: memory for outputs of its vision tower.
    """

    def __init__(
        self, loaded: LoadedModel, objective: Objective, relational_layer: int, tower_cache_bytes: int
    ) -> None:
        self.adapter, self.model, self.objective = loaded.adapter, loaded.model, objective
        self.relational_layer = relational_layer
        self.model.requires_grad_(False).eval()
        self.vision = VisionFeatures(loaded.adapter, loaded.model, tower_cache_bytes)
        self.device = next(self.model.parameters()).device
        self.head = plain_head(loaded.adapter.head(loaded.model), "teacher")
        self._head_elsewhere: torch.Tensor | None = None

    def head_on(self, device: torch.device) -> torch.Tensor:
        """(V_t, d_t) its head where the loss is computed; copied there once if the teacher is elsewhere."""
        if self.head.device != device:
            self._head_elsewhere = (
                self.head.detach().to(device) if self._head_elsewhere is None else self._head_elsewhere
            )
            return self._head_elsewhere
        return self.head

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """What the teacher says about a batch, on the batch's device."""
        where = batch.input_ids.device
        local = batch.to(self.device)
        states = self.adapter.decode(
            self.model,
            local.input_ids,
            local.position_ids,
            self.vision.of(batch.pictures),
            tap=self.relational_layer if self.objective.is_relational and batch.pictures else None,
            segments=batch.segments,
        )
        hidden = states.last.reshape(-1, states.last.shape[-1])[local.supervised]
        gate = self.objective.gate_of(hidden, self.head)
        relational = hidden.new_zeros(0, hidden.shape[-1]) if states.relational is None else states.relational
        return TeacherSignal(hidden.to(where), gate.to(where), relational.to(where), batch.image_lengths)
