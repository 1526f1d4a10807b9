"""What a run will cost, from its recipe and the models' configurations alone: memory by part, FLOP, hours.

Memory is the peak of what PyTorch allocates on one GPU, at the end of a micro-batch's forward pass:

    leaves 2 B a weight, teacher 2 B, and for every trained weight a master, a gradient and two moments, 4 B each;
    activations that the backward pass will read: with checkpointing one (tokens, d) a layer, and one layer opened;
    the workspace of the fused loss: logits of a chunk of tokens and their gradient (losses/linear_gdkd.py).

``benchmarks/bench_true_size.py memory`` compares it with measured peaks. Time is what the GPU computes, at the share of
its rate that our products reach, and what the host needs to launch it: a constant for every pass through a layer, which
at two rows a micro-batch is most of a step. Both constants are from one H100 and its host; expect 30 % either way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grace_vlm.losses.linear_gdkd import WORKSPACE_BYTES, chunking
from grace_vlm.losses.signal import triangle
from grace_vlm.models.adapter import Adapter
from grace_vlm.models.fp8 import ROUNDED
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.train.adamw8 import BLOCK
from grace_vlm.train.config import Recipe
from grace_vlm.train.estimate_shares import DecoderLayers, on_each
from grace_vlm.train.open import is_trained

GPUS: Mapping[str, float] = {
    "h100": 989e12,
    "h200": 989e12,
    "a100": 312e12,
    "l40s": 362e12,
    "rtx4090": 165e12,
}
"""Dense BF16 FLOP/s by the vendor's data sheet."""
ACHIEVED_FRACTION = 0.5
"""Of the data sheet's rate, what the products of a step reach once they run (benchmarks/results/true_size.csv)."""
LAUNCH_SECONDS = {False: 0.0024, True: 0.0005}
"""Of the host, for one pass of one micro-batch through one decoder layer, as it is and compiled."""
WHOLE_LOGITS_BYTES = {"reference": (12, 48), "official": (12, 40)}
"""A supervised position and word where the loss keeps whole logits, without a teacher and with one: logits and what
autograd keeps of them (largest sum of live tensors, counted on a CPU)."""
GIB = 1 << 30


TEXT_TOKENS, SUPERVISED_TOKENS = 316, 266
"""Of a row that nothing is known of: as in the measured cases, and near what ShareGPT4V's captions have."""


@dataclass(frozen=True)
class Load:
    """What rows look like: tokens of a row, how many of them are visual, which share is supervised."""

    row_tokens: int
    visual_tokens: int
    supervised_share: float


def visual_tokens_of(recipe: Recipe, config: Any) -> int:
    """Visual tokens of a picture as large as the recipe (or LLaVA's fixed size) allows; 448 x 448 if neither does."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is None:
        return int((vision.image_size // vision.patch_size) ** 2)
    return int((recipe.data.max_pixels or 448 * 448) // (vision.patch_size * merge) ** 2)


@dataclass(frozen=True)
class TeacherHead:
    """All that is on the GPU of a teacher that is read from a cache: its head (words, width)."""

    words: int
    width: int


Teacher = tuple[Any, Adapter] | TeacherHead | None
"""A model on the meta device with its adapter, or the head of one that is cached; None for methods without one."""


@dataclass(frozen=True)
class Estimate:
    """Peak memory by part in bytes, work of an optimizer step, and of the whole run.

    Args:
        memory: of the student's GPU. teacher_memory: of the teacher's, where it has one of its own.
        num_rows: of one optimizer step on one process; ``tokens``, ``flop`` and ``layer_passes`` likewise.
        flop: of one optimizer step; ``flop_by_part`` adds up to it.
        layer_passes: of one optimizer step: micro-batches times decoder layers times passes, student and teacher.
        is_compiled: whether those layers are.
    """

    memory: Mapping[str, int]
    teacher_memory: Mapping[str, int]
    num_rows: int
    tokens: int
    flop_by_part: Mapping[str, float]
    num_steps: int
    layer_passes: float
    is_compiled: bool

    @property
    def peak_bytes(self) -> int:
        """Of the student's GPU."""
        return sum(self.memory.values())

    @property
    def largest_bytes(self) -> int:
        """Of the GPU that needs more."""
        return max(self.peak_bytes, sum(self.teacher_memory.values()))

    @property
    def flop(self) -> float:
        return sum(self.flop_by_part.values())

    def step_seconds(self, gpu: str) -> float:
        """One optimizer step on one GPU of that name, or on two where the teacher has its own."""
        flop = self.flop
        if self.teacher_memory:
            # Side by side: the slower of the two.
            teacher = sum(value for part, value in self.flop_by_part.items() if part.startswith("teacher"))
            teacher -= self.flop_by_part.get("teacher head", 0.0) / 2  # for the loss, where the student is
            flop = max(teacher, flop - teacher)
        return flop / (GPUS[gpu] * ACHIEVED_FRACTION) + self.layer_passes * LAUNCH_SECONDS[self.is_compiled]

    def hours(self, gpu: str) -> float:
        """The whole run on such GPUs."""
        return self.step_seconds(gpu) * self.num_steps / 3600

    def to_json(self, gpu: str) -> dict[str, Any]:
        return {
            "memory_bytes": dict(self.memory),
            "peak_bytes": self.peak_bytes,
            **({"teacher_memory_bytes": dict(self.teacher_memory)} if self.teacher_memory else {}),
            "rows_per_step": self.num_rows,
            "tokens_per_step": self.tokens,
            "flop_by_part": dict(self.flop_by_part),
            "flop_per_step": self.flop,
            "num_steps": self.num_steps,
            "gpu": gpu,
            "seconds_per_step": self.step_seconds(gpu),
            "hours": self.hours(gpu),
        }


@dataclass(frozen=True)
class _Sizes:
    """Shapes of one model that the formulas need."""

    num_parameters: int
    linear_parameters: Mapping[str, int]
    hidden: int
    intermediate: int
    layers: int
    attention: int
    key_value: int
    vocabulary: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    patches_per_token: int

    @classmethod
    def of(cls, model: Any, adapter: Adapter) -> _Sizes:
        text = model.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        linear: dict[str, int] = {}
        for name, module in model.named_modules():
            part = next((part for part, pattern in adapter.parts.items() if re.fullmatch(pattern, name)), None)
            if part is not None and part != "head":
                linear[part] = linear.get(part, 0) + module.weight.numel()
        vision = model.config.vision_config
        vision_hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
        return cls(
            sum(p.numel() for p in model.parameters()),
            linear,
            text.hidden_size,
            text.intermediate_size,
            text.num_hidden_layers,
            text.num_attention_heads * head_dim,
            text.num_key_value_heads * head_dim,
            text.vocab_size,
            vision_hidden,
            getattr(vision, "intermediate_size", None) or int(vision_hidden * vision.mlp_ratio),
            getattr(vision, "depth", None) or vision.num_hidden_layers,
            getattr(vision, "spatial_merge_size", 1) ** 2,
        )


def _layer_bytes(sizes: _Sizes, tokens: int, is_compiled: bool) -> int:
    """What one decoder layer keeps for its backward pass.

    Compiled, it keeps what products read, in BF16: the layer's input, both norms' outputs and the sum between them;
    queries, keys and values, before and after norm and rotation (repeated for every head); the attention's output; of
    the MLP three products. What lies between is made again.

    As it is:

    Of a norm its input in FP32, what it scales and its output in BF16 (4 + 2 + 2); of a query or key the norm, two
    products of the rotation and itself (8 + 4 + 2); the value; the attention's output; of the MLP four products.
    """
    if is_compiled:
        of_heads = sizes.attention + 2 * sizes.key_value + 4 * sizes.attention
        return tokens * 2 * (4 * sizes.hidden + of_heads + 3 * sizes.intermediate)
    norms = 2 * sizes.hidden * 8
    attention = sizes.attention * (14 + 2) + sizes.key_value * (14 + 2)
    return tokens * (norms + attention + 4 * 2 * sizes.intermediate)


def _forward_flop(sizes: _Sizes, tokens: int, row_tokens: int, patches: int) -> dict[str, float]:
    """FLOP of a forward pass by part, without the head. Attention is causal inside a row."""
    linear = sizes.linear_parameters
    return {
        "decoder": 2.0 * linear.get("language", 0) * tokens,
        "attention": 2.0 * sizes.layers * sizes.attention * row_tokens * tokens,
        "tower": 2.0 * (linear.get("tower", 0) + linear.get("projector", 0) / sizes.patches_per_token) * patches,
    }


@dataclass(frozen=True)
class TeacherPass:
    """The work of asking a teacher about rows once: ``flop`` and passes of a batch through a layer."""

    flop: float
    layer_passes: float
    is_compiled: bool

    def hours(self, gpu: str) -> float:
        """On one GPU of that name."""
        seconds = self.flop / (GPUS[gpu] * ACHIEVED_FRACTION) + self.layer_passes * LAUNCH_SECONDS[self.is_compiled]
        return seconds / 3600


def teacher_pass(recipe: Recipe, teacher: tuple[Any, Adapter], load: Load, num_rows: int) -> TeacherPass:
    """Its forward pass over ``num_rows`` such rows, and its head once a supervised token, for the gate."""
    sizes = _Sizes.of(*teacher)
    tokens, patches = num_rows * load.row_tokens, num_rows * load.visual_tokens * sizes.patches_per_token
    flop = sum(_forward_flop(sizes, tokens, load.row_tokens, patches).values())
    flop += 2.0 * sizes.hidden * sizes.vocabulary * tokens * load.supervised_share
    batches = math.ceil(tokens / recipe.runtime.frozen_batch_tokens)
    return TeacherPass(flop, batches * sizes.layers, recipe.runtime.compile)


def _micro_batch_tokens(recipe: Recipe, load: Load) -> int:
    """Of the largest micro-batch that such rows make."""
    data = recipe.data
    rows_tokens = data.micro_batch_size * load.row_tokens
    return rows_tokens if data.max_batch_tokens is None else min(data.max_batch_tokens, rows_tokens)


def _tower_bytes(recipe: Recipe, sizes: _Sizes, patches: float) -> int:
    """What a trained tower keeps for its backward pass; a frozen one keeps nothing."""
    if not recipe.trains_tower:
        return 0
    one_layer = 24 * sizes.vision_hidden + 8 * sizes.vision_intermediate
    kept = 2 * sizes.vision_hidden * sizes.vision_layers + one_layer
    return int(patches * (kept if recipe.runtime.gradient_checkpointing else one_layer * sizes.vision_layers))


def _trained_parameters(recipe: Recipe, model: Any, adapter: Adapter) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if is_trained(recipe, adapter, name))


def _head_of(teacher: Teacher) -> TeacherHead | None:
    if teacher is None or isinstance(teacher, TeacherHead):
        return teacher
    sizes = _Sizes.of(*teacher)
    return TeacherHead(sizes.vocabulary, sizes.hidden)


def _loss_bytes(recipe: Recipe, supervised: float, num_words: int, hidden: int, head: TeacherHead | None) -> int:
    if recipe.loss.implementation != "fused":
        each = WHOLE_LOGITS_BYTES[recipe.loss.implementation][head is not None]
        # The reference multiplies by FP32 copies of the heads.
        copies = [(num_words, hidden), *([(head.words, head.width)] if head else [])]
        is_reference = recipe.loss.implementation == "reference"
        return int(each * supervised * num_words) + is_reference * sum(4 * words * width for words, width in copies)
    teacher_words = 0 if head is None else head.words
    workspace = recipe.runtime.workspace_bytes or WORKSPACE_BYTES
    return chunking(round(supervised), num_words, teacher_words, 2, workspace).num_bytes


def _memory(
    recipe: Recipe, plan: QuantPlan, student: tuple[Any, Adapter], teacher: Teacher, load: Load
) -> dict[str, int]:
    own = _Sizes.of(*student)
    trained = _trained_parameters(recipe, *student)
    data = recipe.data
    tokens = _micro_batch_tokens(recipe, load)
    rows = tokens / load.row_tokens
    patches = rows * load.visual_tokens * own.patches_per_token
    supervised = tokens * load.supervised_share
    num_scales = sum(entry.num_scales for entry in plan.entries)
    again = recipe.runtime.recomputed_layers(own.layers)
    # Of a layer that is computed again its input, and of one at a time all the rest.
    kept = again * tokens * own.hidden * 2 + (own.layers - again + (again > 0)) * _layer_bytes(
        own, tokens, recipe.runtime.compile
    )
    parts = {
        "student weights": 2 * own.num_parameters,
        "masters": 4 * trained,
        "gradients": 4 * trained,
        "moments": int((2 + 8 / BLOCK if recipe.optim.moments == "8bit" else 8) * trained),
        # log-scale, gradient, two moments, the start for the diary; the scale in use and before rounding; a sign.
        "scales": (32 if recipe.quant.scale_init in ("mse_signed", "stored") else 28) * num_scales,
        "activations": int(kept) + _tower_bytes(recipe, own, patches),
        # What graphs keep for themselves beside a micro-batch of a shape that has none, and their buffers.
        **({"graphs": int(kept) + 10 * tokens * own.hidden * 2} if recipe.runtime.cuda_graphs else {}),
        "loss": _loss_bytes(recipe, supervised, own.vocabulary, own.hidden, _head_of(teacher)),
    }
    num_towers = 1 + (isinstance(teacher, tuple) and not recipe.has_teacher_elsewhere)
    caches = data.pixel_cache_gib + num_towers * recipe.runtime.tower_cache_gib
    if caches:
        parts["caches"] = int(caches * GIB)
    visual = rows * load.visual_tokens
    if isinstance(teacher, TeacherHead):
        parts["teacher head"] = 2 * teacher.words * teacher.width
        # States and the Gram matrices' triangles, of a picture a row.
        grams = 4 * rows * triangle(load.visual_tokens)
        parts["teacher signals"] = int(data.accumulation * (2 * teacher.width * supervised + grams))
    elif teacher is not None:
        theirs = _Sizes.of(*teacher)
        if recipe.has_teacher_elsewhere:
            parts["teacher head"] = 2 * theirs.vocabulary * theirs.hidden
        else:
            parts["teacher weights"] = _teacher_weights(recipe, theirs)
        parts["teacher signals"] = int(data.accumulation * 2 * theirs.hidden * (supervised + visual))
    return parts


def _shared(
    parts: dict[str, int], recipe: Recipe, num_processes: int, student: tuple[Any, Adapter], teacher: Teacher
) -> dict[str, int]:
    """The parts on each of several processes."""
    if num_processes == 1:
        return parts
    is_fp8 = recipe.model.teacher_precision == "fp8"
    own, theirs = _Sizes.of(*student), None
    if isinstance(teacher, tuple) and not recipe.has_teacher_elsewhere:
        sizes = _Sizes.of(*teacher)
        theirs = DecoderLayers(sizes.linear_parameters.get("language", 0), sizes.layers, 1 if is_fp8 else 2)
    trained = 0 if recipe.model.train == "vision" else own.linear_parameters.get("language", 0)
    layers = DecoderLayers(trained, own.layers)
    return on_each(parts, recipe, num_processes, layers, theirs)


def _teacher_weights(recipe: Recipe, theirs: _Sizes) -> int:
    is_fp8 = recipe.model.teacher_precision == "fp8"
    return 2 * theirs.num_parameters - is_fp8 * sum(theirs.linear_parameters.get(part, 0) for part in ROUNDED)


def _teacher_memory(recipe: Recipe, teacher: Teacher, load: Load) -> dict[str, int]:
    """Of a GPU that only the teacher is on: weights, one layer's activations, logits for the gate; else nothing."""
    if not recipe.has_teacher_elsewhere or not isinstance(teacher, tuple):
        return {}
    theirs = _Sizes.of(*teacher)
    own = _micro_batch_tokens(recipe, load)
    tokens = max(own, min(recipe.runtime.frozen_batch_tokens, own * recipe.data.accumulation))
    parts = {
        "teacher weights": _teacher_weights(recipe, theirs),
        "teacher activations": _layer_bytes(theirs, tokens, recipe.runtime.compile),
        "teacher gate": recipe.runtime.workspace_bytes or WORKSPACE_BYTES,
    }
    if recipe.runtime.tower_cache_gib:
        parts["caches"] = int(recipe.runtime.tower_cache_gib * GIB)
    return parts


def _student_passes(recipe: Recipe, num_layers: int) -> float:
    """Forward, twice that backward, and the forward again of layers whose activations are not kept."""
    return 3 + recipe.runtime.recomputed_layers(num_layers) / num_layers


def _flop(recipe: Recipe, student: tuple[Any, Adapter], teacher: Teacher, load: Load) -> dict[str, float]:
    tokens = _micro_batch_tokens(recipe, load) * recipe.data.accumulation
    visual = tokens / load.row_tokens * load.visual_tokens
    supervised = tokens * load.supervised_share
    own = _Sizes.of(*student)
    forward = _forward_flop(own, tokens, load.row_tokens, int(visual * own.patches_per_token))
    passes = _student_passes(recipe, own.layers)
    tower_passes = 1 if not recipe.trains_tower else 4 if recipe.runtime.gradient_checkpointing else 3
    parts = {f"student {part}": flop * (tower_passes if part == "tower" else passes) for part, flop in forward.items()}
    parts["student head"] = 6.0 * own.hidden * own.vocabulary * supervised
    if isinstance(teacher, TeacherHead):
        # For the loss; the gate is read.
        parts["teacher head"] = 2.0 * teacher.width * teacher.words * supervised
    elif teacher is not None:
        theirs = _Sizes.of(*teacher)
        patches = int(visual * theirs.patches_per_token)
        for part, flop in _forward_flop(theirs, tokens, load.row_tokens, patches).items():
            parts[f"teacher {part}"] = flop
        # Once for the gate, once for the loss.
        parts["teacher head"] = 4.0 * theirs.hidden * theirs.vocabulary * supervised
    return parts


def estimate(
    recipe: Recipe,
    plan: QuantPlan,
    student: tuple[Any, Adapter],
    teacher: Teacher,
    load: Load,
    num_processes: int = 1,
) -> Estimate:
    """The cost of a run on one GPU, or on each of several; time without what those exchange.

    Args:
        student: the model on the meta device with its adapter (``models.load.describe_model``). teacher: likewise, or
            the head of one that a cache stands for, or None for methods without one.

    Raises:
        ConfigError: micro-batches that ``num_processes`` cannot share out.
    """
    recipe = recipe.on_each_of(num_processes)
    data = recipe.data
    tokens = _micro_batch_tokens(recipe, load) * data.accumulation
    return Estimate(
        memory=_shared(_memory(recipe, plan, student, teacher, load), recipe, num_processes, student, teacher),
        teacher_memory=_teacher_memory(recipe, teacher, load),
        num_rows=round(tokens / load.row_tokens),
        tokens=tokens,
        flop_by_part=_flop(recipe, student, teacher, load),
        num_steps=recipe.optim.num_steps,
        layer_passes=_layer_passes(recipe, student[0], teacher[0] if isinstance(teacher, tuple) else None, load),
        is_compiled=recipe.runtime.compile,
    )


def _layer_passes(recipe: Recipe, student: Any, teacher: Any, load: Load) -> float:
    """Micro-batches times layers times passes; the teacher sees several micro-batches at a time."""
    data = recipe.data
    layers = student.config.text_config.num_hidden_layers
    passes = data.accumulation * _student_passes(recipe, layers) * layers
    if teacher is not None:
        together = max(1, recipe.runtime.frozen_batch_tokens // _micro_batch_tokens(recipe, load))
        passes += math.ceil(data.accumulation / together) * teacher.config.text_config.num_hidden_layers
    return passes
