"""Teachers: what turns micro-batches into ``TeacherSignal``s. Here the online one, a frozen model in BF16 or FP8.

It may be on another device than the student (``model.teacher_device``). Then the two can run side by side: the host
queues the next step, and with it the teacher's part of it, before the student has finished this one, and the teacher
takes what it needs from the host, not from the student's device, where it would have to wait. How far the host is ahead
is what it can launch while the student works.

The other is ``teacher_cache.py``: what a teacher said before, read from a disk. The step knows neither from the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch

from grace_vlm.data.collate import Batch, grouped, merge
from grace_vlm.kernels.upload import upload
from grace_vlm.losses.objective import Objective
from grace_vlm.losses.signal import TeacherSignal
from grace_vlm.models.adapter import plain_head
from grace_vlm.models.compiled import compile_layers
from grace_vlm.models.graphs import GraphMemory, graph_layers
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.vision import VisionFeatures


class Teacher(Protocol):
    """What a step asks of its teacher. ``head``: (V_t, d_t), on the student's device."""

    @property
    def head(self) -> torch.Tensor: ...

    def keeps(self, name: str) -> bool:
        """Whether it needs no pixels of a picture."""
        ...

    def signals(self, batches: Sequence[Batch], max_tokens: int) -> list[TeacherSignal]:
        """What it says about each batch (as the loader made it, on the host), on the student's device; it may look at
        ``max_tokens`` at a time."""
        ...

    def compile_layers(self) -> None:
        """Compile what it has to compute."""
        ...

    def graph_layers(self, memory: GraphMemory) -> None:
        """Ask for what it has to compute as CUDA graphs, in the student's memory if it is on the same GPU."""
        ...


class OnlineTeacher:
    """Runs the teacher in the process of the student.

    Args:
        loaded: the teacher, on its device.
        relational_layer: the tapped index of ``hidden_states``.
        tower_cache_bytes: memory for outputs of its vision tower.
        where: the student's device; None: the teacher's own.
        together: so many batches share a forward pass, where other processes must make as many passes; None: as many
            as have room in one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        objective: Objective,
        relational_layer: int,
        tower_cache_bytes: int,
        where: torch.device | None = None,
        together: int | None = None,
    ) -> None:
        self.adapter, self.model, self.objective = loaded.adapter, loaded.model, objective
        self.relational_layer = relational_layer
        self.model.requires_grad_(False).eval()
        self.vision = VisionFeatures(loaded.adapter, loaded.model, tower_cache_bytes)
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.where = self.device if where is None else where
        self.together = together
        self._own_head = plain_head(loaded.adapter.head(loaded.model), "teacher")
        self.head = self._own_head.detach().to(self.where)

    def keeps(self, name: str) -> bool:
        """Whether it knows a picture already, so that its pixels are not needed."""
        return self.vision.keeps(name)

    def compile_layers(self) -> None:
        """Compile the decoder's layers."""
        compile_layers(self.model)

    def graph_layers(self, memory: GraphMemory) -> None:
        """Run the decoder's layers as CUDA graphs."""
        graph_layers(self.model, memory=memory)

    def signals(self, batches: Sequence[Batch], max_tokens: int) -> list[TeacherSignal]:
        """What the teacher says about each batch, on the student's device.

        Neighbours share a forward pass of up to ``max_tokens``: the student's small micro-batches would leave a GPU
        waiting for its host 36 layers long.
        """
        if self.together is None:
            groups = grouped(batches, max_tokens)
        else:
            groups = [list(batches[at : at + self.together]) for at in range(0, len(batches), self.together)]
        # All of them before the first leaves: a copy to the student's GPU waits for what is queued there.
        said = [self.signal(merge(group)) for group in groups]
        parts = [split_signal(self._sent(signal), group) for signal, group in zip(said, groups, strict=True)]
        return [signal for part in parts for signal in part]

    def _sent(self, signal: TeacherSignal) -> TeacherSignal:
        """From the teacher's device to the student's."""
        assert isinstance(signal.relational, torch.Tensor)
        hidden, gate, relational = (upload(x, self.where) for x in (signal.hidden, signal.gate, signal.relational))
        return TeacherSignal(hidden, gate, relational, signal.image_lengths)

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """What the teacher says about a batch, on its own device."""
        # Triton launches on the current device, wherever its tensors are.
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with current:
            local = batch.to(self.device)
            states = self.adapter.decode(
                self.model,
                local.input_ids,
                local.position_ids,
                self.vision.of(batch.pictures),
                tap=self.relational_layer if self.objective.is_relational and batch.pictures else None,
                segments=batch.segments,
                visual=local.visual,
            )
            hidden = states.last.flatten(0, 1).index_select(0, local.supervised)
            gate = self.objective.gate_of(hidden, self._own_head)
            relational = hidden.new_zeros(0, hidden.shape[-1]) if states.relational is None else states.relational
        return TeacherSignal(hidden, gate, relational, batch.image_lengths)


def split_signal(signal: TeacherSignal, batches: Sequence[Batch]) -> list[TeacherSignal]:
    """The signal of merged batches, batch by batch."""
    tokens = [batch.targets.numel() for batch in batches]
    assert isinstance(signal.relational, torch.Tensor), "an online teacher gives features"
    # Without a picture anywhere nothing was tapped.
    visual = [sum(batch.image_lengths) for batch in batches] if len(signal.relational) else [0] * len(batches)
    parts = zip(
        signal.hidden.split(tokens), signal.gate.split(tokens), signal.relational.split(visual), batches, strict=True
    )
    return [TeacherSignal(hidden, gate, seen, batch.image_lengths) for hidden, gate, seen, batch in parts]
