"""A recipe: every number of a run, each default in exactly one place.

YAML recipe + ``key=value`` overrides (``optim.learning_rate=1e-4``), validated with unknown keys forbidden. What
cannot be honoured is an error, never a fallback. The defaults of ``loss`` are the published ones for Qwen3-VL.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grace_vlm.errors import ConfigError
from grace_vlm.losses.gdkd import GateSignal, VocabularyPolicy
from grace_vlm.losses.objective import Implementation, Method, Objective
from grace_vlm.quant.lsq import ClipMask, ScaleGradient
from grace_vlm.quant.plan import Part
from grace_vlm.quant.scale_init import ScaleRule
from grace_vlm.quant.scheme import ScaleRounding, parse_scheme
from grace_vlm.train.keys import nearest_key, parse_value, set_key

Sharding = Literal["optimizer", "gradients", "parameters"]
"""What several processes share out (``shards.py``)."""
Gather = Literal["weights", "codes"]
Source = Literal["script", "card", "paper", "ours"]
"""Where a value of a published run is from: the authors' script, their model card, the paper, or our choice."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    student: str = Field(
        description="model folder, run folder, hub id; pruned:MODEL:LAYERS of one of these; smollm2:LAYERS with a new "
        "tower, smollm2:LAYERS:MODEL with that of another run; or toy:SIZE and random:ID for a random start"
    )
    base: str | None = Field(
        None,
        description="what a student that is our own run started from; --dry-run describes it until that run exists",
    )
    teacher: str | None = Field(None, description="model folder, run folder or hub id; kd and grace need it")
    teacher_precision: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="fp8: linears of the teacher's decoder and tower in E4M3, a scale a row; it differs a little",
    )
    teacher_device: str | None = Field(
        None,
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="cuda:1, say: the teacher on a GPU of its own, beside the student's step; null: on runtime.device",
    )
    teacher_sharding: Literal["whole", "parameters"] = Field(
        "whole",
        description="parameters: each of several processes keeps its rows of the teacher's decoder layers, and the "
        "next layer's come while one computes (docs/scaling.md)",
    )
    teacher_cache: str | None = Field(
        None,
        description="folder that grace teacher cache made: what the teacher said is read there and no teacher is "
        "opened; teacher may then be left out, else it must be the cache's",
    )
    processor: str | None = Field(None, description="where a toy:SIZE takes its processor; null trains a tokenizer")
    train: Literal["default", "all", "vision"] = Field(
        "default",
        description="default: language model and merger; all: the vision tower too; vision: tower and merger, not the "
        "language model",
    )
    vision_tower: str | None = Field(
        None, description="CLIP folder or hub id of a student in the original LLaVA layout; null: what its config names"
    )


class QuantConfig(_Section):
    scale_rounding: ScaleRounding = Field("bf16", description="how the stored (and trained) scale is rounded")
    scale_init: ScaleRule | Literal["stored"] = Field(
        "mse",
        description="where scales start; mse_signed: negative where that errs less; stored: the student's own",
    )
    clip_mask: ClipMask = Field("official", description="which weights get a gradient")
    scale_gradient: ScaleGradient = Field("none", description="lsq: divide by sqrt(group_size * qmax)")
    projector: str | None = Field(None, description="scheme of the merger or projector; null: BF16, as published")
    tower: str | None = Field(None, description="scheme of the vision tower, for example w8g128; null: BF16")
    head: str | None = Field(None, description="scheme of embedding and head, for example w8g128; null: BF16")
    overrides: dict[str, str] = Field({}, description="pattern of module names -> scheme; the last match wins")


class AdaptiveConfig(_Section):
    initial: float = Field(0.5, description="beta at step 0")
    minimum: float = Field(0.1, description="lower bound of beta")
    maximum: float = Field(1.0, description="upper bound of beta")
    target: float = Field(3.0, description="tau: the GDKD to settle at, nats times T^2")
    step_size: float = Field(0.003, description="eta")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="d of the moving average")


class LossConfig(_Section):
    gate: bool = Field(True, description="weigh tokens by the teacher's confidence (grace)")
    gate_signal: GateSignal = Field("entropy", description="entropy: eq. 2; margin: exp(p1 - p2 - 1), likeliest words")
    gate_temperature: float = Field(1.0, gt=0, description="t of gate^(1/t); below 1, unsure tokens weigh less")
    decoupled: bool = Field(True, description="decoupled instead of plain KL (grace)")
    relational: bool = Field(True, description="relational CKA on visual tokens (grace)")
    adaptive: bool = Field(True, description="move beta online (grace); false keeps fixed_weight")
    fixed_weight: float = Field(1.0, ge=0, description="beta where it is not adaptive; weight of the KL in kd")
    temperature: float = Field(2.0, gt=0, description="T")
    tckd_weight: float = Field(1.0, ge=0, description="a of eq. 3")
    nckd_weight: float = Field(4.0, ge=0, description="b of eq. 3")
    relational_weight: float = Field(3.0, ge=0, description="omega")
    relational_layer: int = Field(-2, description="index into hidden_states; -2 is the input of the last layer")
    min_tokens: int = Field(4, ge=2, description="visual tokens an image needs to enter the relation loss")
    distillation_warmup_steps: int = Field(0, ge=0, description="linear ramp of the distillation term")
    relational_warmup_steps: int = Field(400, ge=0, description="linear ramp of the relation term")
    normalization: Literal["global", "microbatch"] = Field(
        "global", description="counts of the optimizer step over all ranks, or of each micro-batch (official)"
    )
    vocabulary: VocabularyPolicy = Field(
        "common", description="heads of different width over one tokenizer: compare the common words, or an error"
    )
    implementation: Implementation = Field(
        "fused",
        description="fused: no logits of all tokens; reference: whole logits, the same numbers; official: the official "
        "code's BF16 logits and clamps, for parity",
    )
    adaptive_weight: AdaptiveConfig = AdaptiveConfig()


class DataConfig(_Section):
    train: str = Field(description="LLaVA/ShareGPT4V rows, JSON array or JSONL; as given, or below data.root")
    root: str | None = Field(None, description="folder that image paths start from; null: the folder of the rows")
    micro_batch_size: int = Field(8, ge=1, description="rows of one forward on one process")
    accumulation: int = Field(1, ge=1, description="micro-batches of one optimizer step, shared out to the processes")
    max_tokens: int = Field(8192, ge=16, description="longer rows go to the ledger")
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="bad rows over all rows before the run stops")
    group_by_length: bool = Field(False, description="batch rows of similar text length; the order stays seeded")
    packing: bool = Field(False, description="lay the rows of a micro-batch end to end instead of padding them")
    max_batch_tokens: int | None = Field(
        None, ge=16, description="packing: tokens a micro-batch may have; micro_batch_size is then the most rows"
    )
    workers: int = Field(0, ge=0, description="processes that read and decode ahead; 0: in the training process")
    min_pixels: int | None = Field(None, ge=1, description="least area of a picture while training; null: processor's")
    max_pixels: int | None = Field(
        None, ge=1, description="largest area of a picture while training; null: processor's"
    )
    pixel_cache_gib: float = Field(0.0, ge=0, description="memory of the training device for decoded pictures, GiB")
    samples_kept: int = Field(0, ge=0, description="encoded rows kept in host memory for the next epoch")

    @property
    def rows_path(self) -> Path:
        """The file of rows: as given, or below ``root`` if it is there."""
        given = Path(self.train)
        below = Path(self.root) / given if self.root else given
        return below if below.is_file() and not given.is_file() else given

    @property
    def images_root(self) -> Path:
        """The folder that image paths start from."""
        return Path(self.root) if self.root else self.rows_path.parent


class OptimConfig(_Section):
    num_steps: int = Field(description="optimizer steps", ge=1)
    learning_rate: float = Field(1e-5, gt=0, description="peak, masters")
    scale_learning_rate: float = Field(2e-4, ge=0, description="peak, log-scales; 0 keeps them")
    weight_decay: float = Field(1e-3, ge=0, description="linear weights only, never norms, embeddings or scales")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam")
    epsilon: float = Field(1e-8, gt=0, description="Adam")
    warmup_fraction: float = Field(0.03, ge=0, le=1, description="share of the steps with a rising rate")
    max_grad_norm: float = Field(1.0, gt=0, description="global clip over weights and scales")
    moments: Literal["fp32", "8bit"] = Field(
        "fp32", description="8bit: Adam's moments of large masters in one byte each; updates differ a little"
    )


class RuntimeConfig(_Section):
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1")
    seed: int = Field(0, description="order of the rows, and a toy's random start")
    gradient_checkpointing: bool = Field(False, description="recompute activations of the decoder layers")
    kept_layers: int = Field(
        0, ge=0, description="gradient_checkpointing: so many of the last decoder layers keep theirs all the same"
    )
    compile: bool = Field(
        False, description="on a GPU, compile the decoder layers: a minute at the start, a third less time after"
    )
    cuda_graphs: bool = Field(
        False,
        description="on a GPU in BF16, ask for all layers of a packed micro-batch at once instead of kernel by kernel, "
        "where the host is what a step waits for; unless deterministic, a resumed run then repeats the first up to "
        "rounding",
    )
    deterministic: bool = Field(
        False, description="on a GPU, take only what adds up in the same order every time: a run repeats, more slowly"
    )
    sharding: Sharding | None = Field(
        None,
        description="what several processes share out: optimizer (masters, scales, moments; ZeRO-1), gradients (and "
        "gradient sums of the decoder layers; ZeRO-2), parameters (and their weights; FSDP2, ZeRO-3); null: what the "
        "launcher asks for, else optimizer",
    )
    gather: Gather = Field(
        "weights",
        description="how several processes give each other the weights of a step: in BF16, or those on a grid as codes "
        "and scales, which are baked on arrival; the same bits, less to move and more to compute (docs/scaling.md)",
    )
    loss_workspace_mib: int | None = Field(
        None,
        ge=1,
        description="logits and their gradient that the fused loss holds at a time; null: 1,192 (GPU), 61 (CPU)",
    )
    frozen_batch_tokens: int = Field(
        8192, ge=1, description="teacher and vision towers see micro-batches of a step together, up to so many tokens"
    )
    tower_cache_gib: float = Field(0.0, ge=0, description="memory for outputs of the frozen vision tower, GiB")
    record_every_steps: int = Field(1, ge=1, description="one line of metrics.jsonl each so many steps")
    checkpoint_every_steps: int = Field(0, ge=0, description="0: none")
    keep_checkpoints: int = Field(2, ge=1, description="newest complete ones kept")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="besides metrics.jsonl")

    @property
    def workspace_bytes(self) -> int | None:
        return None if self.loss_workspace_mib is None else self.loss_workspace_mib << 20

    def recomputed_layers(self, num_layers: int) -> int:
        """How many of a decoder's first layers keep no activations."""
        return max(0, num_layers - self.kept_layers) if self.gradient_checkpointing else 0


class Recipe(_Section):
    """A run."""

    method: Method = Field(description="sft, qat, kd or grace")
    scheme: str = Field(description="bf16 or w{8,4,3,2}g{N}")
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    loss: LossConfig = LossConfig()
    quant: QuantConfig = QuantConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    sources: dict[Source, tuple[str, ...]] = Field(
        {}, description="of a published run: which keys are from the script, the model card, the paper, or ours"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        quantized = parse_scheme(self.scheme) is not None
        if self.method == "sft" and quantized:
            raise ConfigError(f"method sft trains in bf16, scheme is {self.scheme}; use method=qat or scheme=bf16")
        if self.method == "qat" and not quantized:
            raise ConfigError("method qat needs a grid, scheme is bf16; use scheme=w4g128 or method=sft")
        if self.method in ("kd", "grace") and self.model.teacher is None and self.model.teacher_cache is None:
            raise ConfigError(f"method {self.method} needs a teacher; set model.teacher to a model folder")
        if self.loss.implementation == "official" and not (
            self.objective().is_decoupled or self.method in ("sft", "qat")
        ):
            raise ConfigError(
                "loss.implementation=official has no plain KL (method kd, loss.decoupled=false); use fused or reference"
            )
        gate = self.loss.gate_signal, self.loss.gate_temperature
        if self.loss.implementation == "official" and self.objective().is_gated and gate != ("entropy", 1):
            raise ConfigError("loss.implementation=official has the published gate; use fused or reference")
        self._check_data()
        self.check_sharding(self.runtime.sharding)
        return self

    def check_sharding(self, sharding: Sharding | None) -> None:
        """``ConfigError`` for what does not go together with a sharding, chosen here or by the launcher."""
        graphs, teacher = self.runtime.cuda_graphs, self.model
        if self.runtime.gather == "codes" and sharding == "parameters":
            raise ConfigError(
                "runtime.gather=codes is for weights that are gathered once a step, and runtime.sharding=parameters "
                "gathers them in every pass; set one of them only"
            )
        if graphs and sharding in ("gradients", "parameters"):
            raise ConfigError(
                f"runtime.sharding={sharding} exchanges between layers, which runtime.cuda_graphs would record; "
                "set runtime.cuda_graphs=false (runtime.compile stays)"
            )
        if teacher.teacher_sharding == "whole" or not self.objective().needs_teacher:
            return
        for is_so, key, why in (
            (teacher.teacher_cache is not None, "model.teacher_cache", "a cached teacher has no layers"),
            (self.has_teacher_elsewhere, "model.teacher_device", "a GPU of its own holds it whole"),
            (graphs, "runtime.cuda_graphs", "layers that come and go are not recorded"),
        ):
            if is_so:
                raise ConfigError(f"model.teacher_sharding=parameters and {key}: {why}; set one of them only")

    def _check_data(self) -> None:
        data = self.data
        if data.max_batch_tokens is not None and not data.packing:
            raise ConfigError("data.max_batch_tokens is for packed rows; set data.packing=true or leave it out")
        if data.max_batch_tokens is not None and data.max_batch_tokens < data.max_tokens:
            raise ConfigError(
                f"data.max_batch_tokens is {data.max_batch_tokens} and a row may have {data.max_tokens} "
                "(data.max_tokens); a micro-batch must hold the longest row"
            )
        if data.packing and data.group_by_length:
            raise ConfigError("data.group_by_length saves padding and packing has none; choose one of them")
        if self.runtime.cuda_graphs and not data.packing:
            raise ConfigError(
                "runtime.cuda_graphs is for packed rows; set data.packing=true or runtime.cuda_graphs=false"
            )
        if self.has_teacher_elsewhere and data.pixel_cache_gib:
            raise ConfigError(
                "data.pixel_cache_gib keeps pixels on the student's GPU, where a teacher on model.teacher_device would "
                "wait for them; set one of the two to null or 0"
            )
        kept = (data.pixel_cache_gib, data.samples_kept, self.runtime.tower_cache_gib)
        if data.workers and any(kept):
            raise ConfigError(
                "data.workers read every row anew and cannot share data.pixel_cache_gib, data.samples_kept or "
                "runtime.tower_cache_gib; set those to 0 or data.workers=0"
            )

    @property
    def trains_tower(self) -> bool:
        """Whether the vision tower is trained."""
        return self.model.train in ("all", "vision")

    @property
    def teacher_device(self) -> str:
        """Where an online teacher is to be, as ``models.load.pick_device`` takes it."""
        return _numbered(self.model.teacher_device or "") if self.has_teacher_elsewhere else self.runtime.device

    @property
    def has_teacher_elsewhere(self) -> bool:
        """Whether an online teacher is on another device than the student."""
        teacher = self.model.teacher_device
        is_asked = self.objective().needs_teacher and self.model.teacher_cache is None
        return is_asked and teacher is not None and _numbered(teacher) != _numbered(self.runtime.device)

    def on_each_of(self, num_processes: int) -> Recipe:
        """The recipe with the micro-batches of a step that each of so many processes has."""
        each, left = divmod(self.data.accumulation, num_processes)
        if left:
            raise ConfigError(
                f"data.accumulation is {self.data.accumulation} micro-batches a step for {num_processes} "
                "processes; expected a multiple, so that every process has as many"
            )
        return self.model_copy(update={"data": self.data.model_copy(update={"accumulation": each})})

    @property
    def frozen_batches_together(self) -> int:
        """So many micro-batches have at most ``runtime.frozen_batch_tokens``, whatever their rows."""
        data = self.data
        most = data.max_batch_tokens if data.max_batch_tokens is not None else data.micro_batch_size * data.max_tokens
        return max(1, self.runtime.frozen_batch_tokens // most)

    def part_schemes(self) -> dict[Part, str]:
        """Schemes of the parts beside the language model that have one."""
        quant = self.quant
        named: dict[Part, str | None] = {"projector": quant.projector, "tower": quant.tower, "head": quant.head}
        return {part: scheme for part, scheme in named.items() if scheme is not None}

    def objective(self) -> Objective:
        """The part of the recipe that the loss knows."""
        loss = self.loss
        return Objective(
            self.method,
            gate=loss.gate,
            gate_signal=loss.gate_signal,
            gate_temperature=loss.gate_temperature,
            decoupled=loss.decoupled,
            relational=loss.relational,
            temperature=loss.temperature,
            tckd_weight=loss.tckd_weight,
            nckd_weight=loss.nckd_weight,
            relational_weight=loss.relational_weight,
            min_tokens=loss.min_tokens,
            vocabulary=loss.vocabulary,
            implementation=loss.implementation,
            workspace_bytes=self.runtime.workspace_bytes,
        )


def _numbered(device: str) -> str:
    """A GPU by its number: the first where none is said."""
    return "cuda:0" if device in ("auto", "cuda") else device


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; every fault is one ``ConfigError`` line that names the key."""
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist; see recipes/ for those that ship")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(getattr(error, "problem", None) or "not UTF-8")
        raise ConfigError(f"recipe {path} is not YAML: {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} is not a mapping of sections")
    given = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value, for example optim.num_steps=100")
        set_key(tree, key, parse_value(value))
        given.append(key)
    return recipe_from(tree, str(path), given)


def recipe_from(tree: dict[str, Any], where: str, overridden: Sequence[str] = ()) -> Recipe:
    """Validate a mapping; ``where`` names it in errors, but for keys that are ``overridden``."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        at = "on the command line" if key in overridden else f"in {where}"
        if first["type"] == "extra_forbidden":
            guess = f"did you mean {near}? " if (near := nearest_key(Recipe, key)) else ""
            raise ConfigError(f"unknown key {key} {at}; {guess}see docs/recipes.md for the keys there are") from None
        if first["type"] == "missing":
            raise ConfigError(f"{where} lacks the key {key}; add it or pass {key}=VALUE") from None
        given = first.get("input")
        raise ConfigError(f"{key} {at} is {given!r}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML, defaults included: a run folder's ``config.yaml``."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
