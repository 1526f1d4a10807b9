"""Open what a recipe names: student, teacher, plan. ``toy:``, ``random:``, ``smollm2:`` and ``pruned:`` names are made
of something, the rest is read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grace_vlm.data.encode import Encoder
from grace_vlm.data.ledger import Ledger
from grace_vlm.data.loader import TrainLoader
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.reader import Preparer, RowReader
from grace_vlm.data.rows import RowFile
from grace_vlm.errors import ConfigError, DataError
from grace_vlm.formats.folder import GRID, START, open_grid
from grace_vlm.models.adapter import Adapter, plan_model, stored_name
from grace_vlm.models.load import (
    Cut,
    LoadedModel,
    describe_config,
    describe_model,
    is_hub_id,
    is_original,
    load_model,
    load_processor,
    meta_model,
    pick_device,
    placed,
)
from grace_vlm.models.prune import PREFIX as PRUNED
from grace_vlm.models.prune import kept_layers, parse_pruned, prune, pruned_config
from grace_vlm.models.random_start import PREFIX as RANDOM
from grace_vlm.models.random_start import build_random_model, random_config, take_ids
from grace_vlm.models.registry import adapter_for
from grace_vlm.models.smollm2 import PREFIX as SMOLLM2
from grace_vlm.models.smollm2 import build_smollm2, build_smollm2_processor, smollm2_config
from grace_vlm.models.tokenizers import require_same_tokens
from grace_vlm.models.toy import build_toy_model, build_toy_processor
from grace_vlm.quant.plan import QuantPlan
from grace_vlm.quant.scale_init import ScaleRule
from grace_vlm.train.config import Recipe

TOY = "toy:"
GIB = 1 << 30


def open_rows(recipe: Recipe) -> RowFile:
    """The rows to train on; ``DataError`` says where they were looked for."""
    path, root = recipe.data.rows_path, recipe.data.root
    if not path.is_file():
        below = f" and not below data.root={root} either" if root and not Path(recipe.data.train).is_absolute() else ""
        raise DataError(
            f"data.train={recipe.data.train} is no file here{below}; make it with grace data prepare (docs/data.md), "
            "or name a JSON array or JSONL of LLaVA rows"
        )
    images, found = recipe.data.images_root, path.stat()
    return _opened(path, images, (Path.cwd(), images.resolve(), found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _opened(path: Path, root: Path, stamp: tuple[object, ...]) -> RowFile:
    """Runs of one process, one after another, share what was found out about a file that did not change."""
    return RowFile(path, root)


def describe_student(recipe: Recipe) -> tuple[Any, Adapter]:
    """The student on the meta device; its base while the student is a run that is not there yet."""
    return describe(started_from(recipe).model.student)


def started_from(recipe: Recipe) -> Recipe:
    """The recipe itself, or with what its student started from while the student is a run that is not there yet."""
    if recipe.model.base is None or not _is_run_to_come(recipe):
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"student": recipe.model.base})})


def check_relational_layer(recipe: Recipe, model: Any) -> None:
    """``ConfigError`` if ``loss.relational_layer`` names no layer's input (a meta model will do)."""
    tap, num_layers = recipe.loss.relational_layer, model.config.text_config.num_hidden_layers
    if recipe.objective().is_relational and not 0 <= (tap if tap >= 0 else num_layers + 1 + tap) < num_layers:
        raise ConfigError(
            f"loss.relational_layer is {tap} and the decoder has {num_layers} layers; expected the input of one: "
            f"0 to {num_layers - 1}, or -{num_layers + 1} to -2"
        )


def check_trained_tower(recipe: Recipe, model: Any) -> None:
    """``ConfigError`` for CUDA graphs of a decoder that a trained tower also adds to behind its first layers (a meta
    model will do): graphs return the gradient of what enters the first one only."""
    layers = getattr(model.config.vision_config, "deepstack_visual_indexes", ())
    if recipe.runtime.cuda_graphs and recipe.trains_tower and layers:
        raise ConfigError(
            f"runtime.cuda_graphs with model.train={recipe.model.train}: this tower adds to layers of the decoder "
            f"(DeepStack, {len(layers)}), whose graphs make no gradient for it; set model.train=default or "
            "runtime.cuda_graphs=false"
        )


def _is_run_to_come(recipe: Recipe) -> bool:
    """Whether the student is a run of ours that is not there yet; a hub id or a random start never is."""
    name = recipe.model.student
    if name.startswith((TOY, RANDOM, SMOLLM2)):
        return False
    name = parse_pruned(name)[0] if name.startswith(PRUNED) else name
    return not (Path(name).exists() or is_hub_id(name))


def describe(name: str) -> tuple[Any, Adapter]:
    """The model that a recipe names, on the meta device, and its adapter; ``ConfigError`` if it cannot be described."""
    if name.startswith(TOY):
        raise ConfigError(f"{name} has no size before its tokenizer is trained on the rows; --dry-run needs a model")
    if name.startswith(SMOLLM2):
        return meta_model(smollm2_config(name, build_smollm2_processor().tokenizer))
    if name.startswith(PRUNED):
        return meta_model(_config_of_pruned(name))
    return meta_model(random_config(name)) if name.startswith(RANDOM) else describe_model(name)


def _config_of_pruned(name: str) -> Any:
    config = describe_config(parse_pruned(name)[0])
    return pruned_config(config, kept_layers(name, config.text_config.num_hidden_layers))


def open_student(recipe: Recipe, rows: RowFile) -> LoadedModel:
    """The student of a recipe: a folder or a hub id, some layers of one, SmolLM2 with a tower of random weights, or a
    random start with a tokenizer trained on the rows' texts."""
    name, device = recipe.model.student, pick_device(recipe.runtime.device)
    if name.startswith(TOY):
        size = name.removeprefix(TOY)
        processor = _open_processor(recipe, rows, size)
        model = build_toy_model(size, processor, recipe.runtime.seed).to(device).eval()
        return LoadedModel(model, processor, adapter_for(model.config.model_type), name)
    if name.startswith(RANDOM):
        config = random_config(name)
        side = getattr(config.vision_config, "image_size", 112)
        processor = _open_processor(recipe, rows, config.model_type, side)
        model = build_random_model(config, processor.tokenizer, device, recipe.runtime.seed)
        return LoadedModel(model, processor, adapter_for(config.model_type), name)
    if recipe.model.base is not None and _is_run_to_come(recipe):
        raise ConfigError(
            f"{name} does not exist: this recipe goes on from that run; train it first, "
            f"or start from its base with model.student={recipe.model.base}"
        )
    if name.startswith(SMOLLM2):
        processor = build_smollm2_processor()
        model = build_smollm2(name, processor, recipe.runtime.seed)
        model = model.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16).eval()
        return LoadedModel(model, processor, adapter_for("llava"), name)
    if name.startswith(PRUNED):
        whole = load_model(parse_pruned(name)[0], recipe.runtime.device, recipe.model.vision_tower)
        prune(whole.model, kept_layers(name, whole.model.config.text_config.num_hidden_layers))
        return LoadedModel(whole.model, whole.processor, whole.adapter, name)
    return load_model(name, recipe.runtime.device, recipe.model.vision_tower)


def scale_start(recipe: Recipe, student: LoadedModel, plan: QuantPlan) -> ScaleRule | dict[str, torch.Tensor]:
    """Where a student's scales start: by a rule, or as its folder has them, (out, groups) by module name.

    Raises:
        ConfigError: ``quant.scale_init=stored``, and the folder has no grid, or another than the recipe.
    """
    rule = recipe.quant.scale_init
    if rule != "stored":
        return rule
    folder, found = Path(student.path), dict[str, torch.Tensor]()
    if not plan.schemes:
        return found
    place = next((place for place in (START, GRID) if (folder / place).is_dir()), None)
    if place is None:
        raise ConfigError(
            f"quant.scale_init=stored wants a folder with its grid, as grace quantize and grace train write it, and "
            f"{student.path} has none; take a rule, for example mse"
        )
    stored = open_grid(folder, place)[2]
    for name, scheme in plan.schemes.items():
        tensor = stored.get(stored_name(student.adapter, name))
        if tensor is None or tensor.scheme != scheme:
            own = f"{tensor.scheme.name}, {tensor.scheme.scale_rounding}" if tensor is not None else "bf16"
            raise ConfigError(
                f"quant.scale_init=stored, and {name} is {own} in {folder} and {scheme.name}, {scheme.scale_rounding} "
                "here; set scheme and quant.scale_rounding to the student's, or take a rule, for example mse"
            )
        found[name] = tensor.scale
    return found


def open_without_weights(recipe: Recipe, rows: RowFile) -> LoadedModel:
    """What rows are encoded with: the student's processor and configuration, its model on the meta device.

    A ``toy:`` student and one in the original LLaVA layout are opened whole, on the host: theirs come with the model.
    """
    name = recipe.model.student
    if name.startswith(RANDOM):
        config = random_config(name)
        side = getattr(config.vision_config, "image_size", 112)
        processor = _open_processor(recipe, rows, config.model_type, side)
        take_ids(config, processor.tokenizer)
    elif name.startswith(SMOLLM2):
        processor = build_smollm2_processor()
        config = smollm2_config(name, processor.tokenizer)
    elif name.startswith(TOY) or is_original(parse_pruned(name)[0] if name.startswith(PRUNED) else name):
        runtime = recipe.runtime.model_copy(update={"device": "cpu"})
        return open_student(recipe.model_copy(update={"runtime": runtime}), rows)
    elif name.startswith(PRUNED):
        config, processor = _config_of_pruned(name), load_processor(parse_pruned(name)[0])
    else:
        config, processor = describe_config(name), load_processor(name)
    return LoadedModel(meta_model(config)[0], processor, adapter_for(config.model_type), name)


def _open_processor(recipe: Recipe, rows: RowFile, size: str, side: int = 112) -> Any:
    if recipe.model.processor:
        return load_processor(recipe.model.processor)
    texts = (turn.text for row in rows for turn in getattr(row, "turns", ()))
    return build_toy_processor(texts, size=size, side=side)


def open_loader(
    recipe: Recipe,
    rows: RowFile,
    student: LoadedModel,
    ledger: Ledger,
    device: torch.device,
    *,
    keeps: Callable[[str], bool] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """The stream of micro-batches of a recipe.

    Args:
        device: where kept pixels live. keeps: whether a picture's features are kept, so that its pixels need not come.
    """
    data = recipe.data
    preparer = open_preparer(
        recipe,
        student,
        rows,
        device=device,
        dtype=next(student.model.parameters()).dtype,
        keeps=keeps,
        with_digests=recipe.model.teacher_cache is not None and recipe.objective().needs_teacher,
    )
    return TrainLoader(
        RowReader(preparer, ledger, data.max_bad_fraction),
        data.micro_batch_size,
        recipe.runtime.seed,
        group_by_length=data.group_by_length,
        packed=data.packing,
        max_batch_tokens=data.max_batch_tokens,
        num_workers=data.workers,
        rank=rank,
        world_size=world_size,
    )


def open_preparer(
    recipe: Recipe,
    student: LoadedModel,
    rows: RowFile,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype,
    keeps: Callable[[str], bool] | None = None,
    with_digests: bool = False,
) -> Preparer:
    """What reads and encodes the rows of a recipe for its student.

    Args:
        device: where decoded pictures are kept, if the recipe keeps them. dtype: of pixels.
        keeps: whether a picture's features are kept, so that its pixels need not come.
        with_digests: as for ``PictureStore``.
    """
    data, config = recipe.data, student.model.config
    patchify = patchify_of(student.adapter, config, student.processor, data.min_pixels, data.max_pixels)
    pictures = PictureStore(patchify, int(data.pixel_cache_gib * GIB), device, dtype, with_digests)
    encoder = Encoder(student.processor, student.adapter, config)
    return Preparer(rows, encoder, pictures, data.max_tokens, data.samples_kept, keeps)


def open_teacher(recipe: Recipe, student: LoadedModel, cut: Cut | None = None) -> LoadedModel | None:
    """The teacher's model, if the method needs one, ``cut`` on its way to its device; ``ConfigError`` if its tokens are
    not the student's."""
    name = recipe.model.teacher
    if name is None or not recipe.objective().needs_teacher:
        return None
    device = pick_teacher_device(recipe)
    if name.startswith((TOY, RANDOM)):
        teacher = _random_teacher(recipe, name, student, device, cut)
    else:
        teacher = load_model(name, str(device), precision=recipe.model.teacher_precision, cut=cut)
    require_same_tokens(student.processor.tokenizer, teacher.processor.tokenizer)
    if teacher.adapter.model_type != student.adapter.model_type:
        raise ConfigError(
            f"the teacher is {teacher.adapter.model_type} and the student {student.adapter.model_type}; both see the "
            "same visual tokens only if they are of one family"
        )
    return teacher


def pick_teacher_device(recipe: Recipe) -> torch.device:
    """``ConfigError`` for one that is not there, and for a CPU beside a GPU: they compute in different precisions."""
    device, where = pick_device(recipe.teacher_device), pick_device(recipe.runtime.device)
    if device.type != where.type:
        raise ConfigError(
            f"model.teacher_device is {recipe.model.teacher_device} and the student computes on {where}; "
            "expected another GPU, or null for the same device"
        )
    return device


def _random_teacher(
    recipe: Recipe, name: str, student: LoadedModel, device: torch.device, cut: Cut | None
) -> LoadedModel:
    """A teacher that knows nothing, over the student's tokenizer: for trying a set-up."""
    seed = recipe.runtime.seed + 1
    if name.startswith(TOY):
        model = build_toy_model(name.removeprefix(TOY), student.processor, seed)
    else:
        model = build_random_model(random_config(name), student.processor.tokenizer, device, seed)
    adapter = adapter_for(model.config.model_type)
    return LoadedModel(placed(model, device, recipe.model.teacher_precision, cut), student.processor, adapter, name)


def plan_for(recipe: Recipe, student: tuple[Any, Adapter]) -> QuantPlan:
    """Which linear gets which grid; unmatched patterns and groups that do not divide are errors."""
    return plan_model(
        *student,
        recipe.scheme,
        recipe.part_schemes(),
        list(recipe.quant.overrides.items()),
        recipe.quant.scale_rounding,
    )


def is_trained(recipe: Recipe, adapter: Adapter, name: str) -> bool:
    """Whether ``model.train`` trains the parameter ``name``."""
    if recipe.model.train == "vision":
        # Read, not listed by the adapters: all but the decoder with its vocabulary.
        return re.match(r"model\.language_model\.|lm_head\.", name) is None
    return recipe.model.train == "all" or not name.startswith(adapter.frozen)


def choose_trained(recipe: Recipe, student: LoadedModel) -> None:
    """Set ``requires_grad`` as ``is_trained`` says."""
    for name, parameter in student.model.named_parameters():
        parameter.requires_grad_(is_trained(recipe, student.adapter, name))
        if not parameter.requires_grad:
            # Frozen weights are saved in BF16; what the run sees must be what is saved.
            parameter.data.copy_(parameter.data.to(torch.bfloat16))
