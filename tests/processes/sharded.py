"""One of two processes that take the same steps under every sharding: prints as JSON what each case came to.

sharded.py ROWS FOLDER CASE...      under torchrun
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from toy_run import recipe_tree

from grace_vlm.train.config import recipe_from
from grace_vlm.train.loop import Run
from grace_vlm.train.ranks import Ranks

torch.set_num_threads(1)
PACKED = {"data__packing": True, "data__max_batch_tokens": 160, "data__max_tokens": 160}
KEPT = {"runtime__gradient_checkpointing": True, "runtime__kept_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "optimizer": {},
    "gradients": {"runtime__sharding": "gradients"},
    "parameters": {"runtime__sharding": "parameters"},
    "teacher": {"model__teacher_sharding": "parameters"},
    "everything": {"runtime__sharding": "parameters", "model__teacher_sharding": "parameters"},
    "codes": {"runtime__gather": "codes"},
    "restored": {},
    **{
        f"{scheme} {how}": {
            "scheme": scheme,
            "runtime__gather": how,
            "quant": {"head": scheme, "scale_rounding": rounding},
        }
        for scheme, rounding in (("w8g32", "sig5"), ("w3g64", "fp32"))
        for how in ("weights", "codes")
    },
    "recomputed": {"runtime__sharding": "parameters", "runtime__gradient_checkpointing": True},
    "kept": {"runtime__sharding": "parameters", **KEPT},
    "resumed": {"runtime__sharding": "parameters", "model__teacher_sharding": "parameters", **KEPT},
    "fp8": {"model__teacher_precision": "fp8"},
    "fp8 sharded": {"model__teacher_precision": "fp8", "model__teacher_sharding": "parameters"},
    "packed": PACKED,
    "packed parameters": {**PACKED, "runtime__sharding": "parameters", "model__teacher_sharding": "parameters"},
    "two": {"data__accumulation": 4},
    "two gradients": {"data__accumulation": 4, "runtime__sharding": "gradients"},
    "two parameters": {"data__accumulation": 4, "runtime__sharding": "parameters"},
    "bf16": {"method": "kd", "scheme": "bf16"},
    "bf16 parameters": {"method": "kd", "scheme": "bf16", "runtime__sharding": "parameters"},
    "compiled": {"compiled": True},
    "compiled parameters": {"compiled": True, "runtime__sharding": "parameters", **KEPT},
}


def resident(model: Any) -> list[bool]:
    """Of every decoder layer, whether all of its weights are here."""
    layers = model.model.language_model.layers
    return [all(t.untyped_storage().nbytes() for t in (*one.parameters(), *one.buffers())) for one in layers]


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """Of tensors that are here."""
    here = (tensors[key].detach() for key in sorted(tensors) if tensors[key].untyped_storage().nbytes())
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in here)).hexdigest()


def open_run(name: str, rows: str, folder: Path, ranks: Ranks) -> Run:
    overrides = dict(CASES[name])
    is_compiled = overrides.pop("compiled", False)
    tree = recipe_tree(Path(rows).parent, runtime__tower_cache_gib=0, **overrides)
    tree["model"] |= {"student": "toy:student", "teacher": "toy:teacher"}
    run = Run(recipe_from(tree, name), folder / name, ranks=ranks)
    if is_compiled:  # traced as on a GPU, without its code
        for layer in run.student.model.model.language_model.layers:
            layer.compile(dynamic=True, backend="aot_eager")
    return run


def writes_what_was_restored(run: Run) -> bool:
    """Whether masters that are restored while others' leaves are on their way are the ones that arrive."""
    masters, model = run.masters, run.student.model
    own = {name: 1.5 * master.detach() for name, master in masters.masters()}
    scales = {name: scale.detach().clone() for name, scale in masters.log_scales()}
    masters.materialize()
    masters.load_state_dict(own, scales)
    masters.settle()
    found = digest_of(dict(model.named_parameters()))
    masters.materialize()
    masters.settle()
    return found == digest_of(dict(model.named_parameters()))


def take(name: str, rows: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Three steps of a case; ``resumed`` makes the last one as another run, from a checkpoint."""
    run = open_run(name, rows, folder, ranks)
    model = run.student.model
    restored = name != "restored" or writes_what_was_restored(run)
    most = 0
    if run.masters.shards is not None:
        ask = run.masters.shards._ask

        def watched(number: int) -> None:
            nonlocal most
            ask(number)
            most = max(most, sum(resident(model)))

        run.masters.shards._ask = watched  # type: ignore[method-assign]
    before = ranks.sent_bytes
    losses = []
    for step in range(3):
        if name == "resumed" and step == 2:
            run.save(2)
            run = open_run(name, rows, folder, ranks)
            assert run.restore() == 2
        losses += [run.stepper.run(step, [run.loader.next() for _ in range(run.num_micro_batches)]).loss]
    sent = ranks.sent_bytes - before
    state = {**dict(run.masters.masters()), **{f"{n}.log_scale": s for n, s in run.masters.log_scales()}}
    sums = sum(t.numel() for t in run.masters.accumulators())
    return {
        "losses": losses,
        "state": digest_of(state),
        "masters": [float(state[key].detach().double().norm()) for key in sorted(state)],
        "dtypes": sorted({str(tensor.dtype) for tensor in (*state.values(), *run.optimizer.state_dict().values())}),
        "student here": resident(model),
        "leaves": digest_of(dict(model.named_parameters())),
        "restored": restored,
        "teacher here": resident(run.teacher.model) if run.teacher is not None else [],
        "most layers": most,
        "sum elements": sums,
        "sent bytes": sent,
    }


if __name__ == "__main__":
    with Ranks.started("cpu") as ranks:
        found = {name: take(name, sys.argv[1], Path(sys.argv[2]), ranks) for name in sys.argv[3:]}
        both = ranks.gather(found)
    if ranks.is_first:
        print(json.dumps(both))
