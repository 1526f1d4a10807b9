"""``analysis.json``: every number of ``grace analyze``. Pictures and page are made from it alone.

    rows --batch--> teacher: entropy, error, gate       student, before: states against the teacher's (CKA)
                    before, with one layer of the student at a time: output error, KL
    codes of the student, tensor by tensor

What needs a model that was not given is left out, and a sentence says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from grace_vlm.checkpoint.atomic import make_folder, write_json_atomic
from grace_vlm.data.collate import Batch
from grace_vlm.engine.open import open_model
from grace_vlm.errors import ConfigError
from grace_vlm.evals.compare import hardware
from grace_vlm.evals.why.certainty import Certainty
from grace_vlm.evals.why.codes import code_use
from grace_vlm.evals.why.damage import Damage
from grace_vlm.evals.why.relation import Relation
from grace_vlm.evals.why.rows import Sampled, SampledRows
from grace_vlm.evals.why.states import States, Watched
from grace_vlm.models.tokenizers import require_same_tokens
from grace_vlm.quant.scheme import QuantizedTensor

FORMAT_VERSION = 1
FILE = "analysis.json"
Progress = Callable[[int, int], None]


class Analysis:
    """The models, and what is found out about them.

    Args:
        model: the student, quantized or not, in any layout. teacher: its teacher, if there is one. before: the
            student before it was quantized, if there is one.
        sampled: the rows to look at. device: auto, cpu, cuda. linears: also the effect of each linear alone.

    Raises:
        ConfigError: models that do not see the same tokens, or not with the same sizes where these are compared.
        DataError: rows that cannot be read.
    """

    def __init__(
        self,
        model: str,
        teacher: str | None,
        before: str | None,
        sampled: Sampled,
        device: str,
        linears: bool = False,
    ) -> None:
        if linears and before is None:
            raise ConfigError("--linears compares with the student before it was quantized; give --before")
        self.names = {"model": model, "teacher": teacher, "before": before}
        self.sampled = sampled
        loaded, self.codes = open_model(model, device)
        self.rows = SampledRows(loaded, sampled)
        self.student = Watched(loaded, "student")
        self.teacher = self._other(teacher, device, "teacher")
        self.before = self._other(before, device, "before")
        self.certainty = None if self.teacher is None else Certainty(len(self.teacher.head))
        self.relation = None if self.teacher is None else Relation()
        self.relation_before = None if self.teacher is None or self.before is None else Relation()
        self.damage = None if self.before is None or not self.codes else Damage(self.before, self.student, linears)

    def _other(self, path: str | None, device: str, whose: str) -> Watched | None:
        if path is None:
            return None
        loaded, _ = open_model(path, device)
        own, other = self.student.adapter.model_type, loaded.adapter.model_type
        if own != other:
            raise ConfigError(f"--{whose} is {other} and the model {own}; expected one of its family")
        require_same_tokens(self.student.loaded.processor.tokenizer, loaded.processor.tokenizer)
        return Watched(loaded, whose)

    def run(self, progress: Progress = lambda done, total: None) -> dict[str, Any]:
        """Look at all rows, then at the codes; returns the content of ``analysis.json``."""
        done, total = 0, len(self.rows.indices)
        progress(done, total)
        for batch in self.rows.batches():
            self._look(batch)
            done += len(batch.sample_ids)
            progress(done, total)
        return self._result(done)

    @torch.no_grad()
    def _look(self, batch: Batch) -> None:
        own = self._states(self.student, batch, self.relation is not None)
        others = None
        if self.teacher is not None and self.certainty is not None and self.relation is not None:
            others = self._states(self.teacher, batch, True)
            self.certainty.add(batch, others.hidden, self.teacher.head)
            self.relation.add(own.visual, others.visual, batch.image_lengths)
        if self.before is None:
            return
        local = batch.to(self.before.device)
        vision = self.before.vision(batch)
        base = self.before.states(local, vision, visual=others is not None, layers=self.damage is not None)
        if others is not None and self.relation_before is not None:
            self.relation_before.add(base.visual, others.visual, batch.image_lengths)
        if self.damage is not None:
            self.damage.add(local, vision, base, own)

    def _states(self, model: Watched, batch: Batch, visual: bool) -> States:
        return model.states(batch.to(model.device), model.vision(batch), visual=visual)

    def _result(self, num_rows: int) -> dict[str, Any]:
        certain = {} if self.certainty is None else self.certainty.summary()
        return {
            "format_version": FORMAT_VERSION,
            "models": self.names,
            "data": {"path": str(self.sampled.path), "num_rows": num_rows, "seed": self.sampled.seed},
            "hardware": hardware(),
            "dtype": str(self.student.head.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "entropy": certain.get("entropy"),
            "gate": certain.get("gate"),
            "cka": None if self.relation is None else self.relation.summary(),
            "cka_before": None if self.relation_before is None else self.relation_before.summary(),
            "layers": None if self.damage is None else self.damage.summary(),
            "codes": code_use(self.codes) if self.codes else None,
            "left_out": left_out(self.names, self.codes, self.damage is not None and self.damage.linears_left_out),
        }


def left_out(
    names: Mapping[str, str | None], codes: Mapping[str, QuantizedTensor], norms_differ: bool = False
) -> list[str]:
    """A sentence for each part that has no numbers, with what it wants."""
    found = []
    if names["teacher"] is None:
        found.append("Entropy against error, the gate and CKA are left out: they need --teacher.")
    if names["before"] is None:
        found.append("The effect of each layer, and CKA before, are left out: they need --before.")
    if not codes:
        found.append(f"Codes and the effect of each layer are left out: {names['model']} has no grid.")
    if norms_differ:
        found.append(
            f"The effect of each linear is left out: {names['model']} has other norms than --before (AWQ folds scales "
            "into them, training moves them)."
        )
    return found


def write_analysis(out: Path, result: Mapping[str, Any]) -> None:
    """``analysis.json`` in ``out``, which is made."""
    make_folder(out)
    write_json_atomic(out / FILE, dict(result))
