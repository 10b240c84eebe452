"""A student that is some of a model's layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.config import ModelSection
from fastpeft.errors import UserError
from fastpeft.memory.layers import model_layers
from fastpeft.models import bases

from .stored import fingerprint

KEY = "strategy.options.student_layers"
FOLDER = "student"
"""In a run's folder: the student's own weights, which its adapter is for."""
MADE_OF = "student.json"
COUNTS = ("encoder_layers", "num_layers", "n_layer", "n_layers", "num_hidden_layers")
"""Names by which configurations say how many layers there are, but for a decoder behind an encoder."""
DECODERS = ("num_decoder_layers", "decoder_layers")


def kept_of(count: int, wanted: int | list[int]) -> list[int]:
    """Numbers of the layers that a student keeps of `count`: every n-th from the first on, or those that are given.

    Raises:
        UserError: a layer that there is not, or all of them.
    """
    found = list(range(0, count, wanted)) if isinstance(wanted, int) else list(wanted)
    if found[-1] >= count:
        raise UserError(f"{KEY}: expected layers below {count}, which is how many the model has, got {found[-1]}")
    if len(found) == count:
        raise UserError(f"{KEY}: expected to leave out some of the model's {count} layers, got all")
    return found


def counts_of(config: Any) -> list[str]:
    """The configuration's fields for how many layers a model has: one, or an encoder's and a decoder's."""
    text = config.get_text_config() if not getattr(config, "is_encoder_decoder", False) else config
    names = [next((name for name in COUNTS if isinstance(text.__dict__.get(name), int)), None)]
    if getattr(config, "is_encoder_decoder", False):
        names.append(next((name for name in DECODERS if isinstance(text.__dict__.get(name), int)), None))
    if None in names:
        raise UserError(f"{KEY}: expected a model whose configuration says how many layers it has, got {_kind(config)}")
    return [str(name) for name in names]


def count_of(config: Any) -> int:
    """How many layers a model has; of an encoder-decoder, how many its encoder has."""
    text = config.get_text_config() if not getattr(config, "is_encoder_decoder", False) else config
    return int(getattr(text, counts_of(config)[0]))


def check(config: Any, wanted: int | list[int]) -> None:
    """Raise UserError unless the layers are there, told from the model's configuration."""
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{KEY}: expected a model whose checkpoint is not quantised, got {_kind(config)}")
    text = config.get_text_config() if not getattr(config, "is_encoder_decoder", False) else config
    for name in counts_of(config):
        kept_of(getattr(text, name), wanted)


def make(
    model: ModelSection,
    task: str,
    wanted: int | list[int],
    folder: Path,
    tokenizer: Any,
    seed: int,
    *,
    may_replace: bool,
    **head: Any,
) -> None:
    """Write the student as a checkpoint of its own, in the dtype of the model's, unless this one is there.

    Args:
        model: whose layers are taken.
        task: that it is loaded for.
        wanted: every n-th, or these.
        folder: where to.
        tokenizer: of both.
        seed: of a fresh head's values, which torch's generator was given.
        may_replace: another student in the folder; else it is one that a run goes on with.
        head: as `tasks.head_options`.

    Raises:
        UserError: the model cannot be loaded, its layers cannot be told, or it is not what the student was made of.
    """
    import torch

    config = bases.load_config(model)
    weights = fingerprint([model.name], str(getattr(config, "_commit_hash", None)))
    about = {"model": model.name, "weights": weights, "layers": wanted, "task": task, "head": head, "seed": seed}
    made_of = json.dumps(about, sort_keys=True)
    if (folder / MADE_OF).is_file():
        if (folder / MADE_OF).read_text(encoding="utf-8") == made_of:
            return
        if not may_replace:
            raise UserError(f"--resume: expected {model.name} as {folder} was made of it, got other weights or options")
    elif folder.exists():
        raise UserError(f"training.output_dir: expected a folder without another's {folder.name} in it, got {folder}")
    stored = getattr(config, "dtype", None) or torch.float32
    base, _ = bases.load_base(model, task, torch.device("cpu"), stored, **head)
    cut(base, wanted)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    base.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / MADE_OF).write_text(made_of, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def cut(base: Any, wanted: int | list[int]) -> None:
    """Leave a model, in place, with some of its layers; its configuration says so.

    Raises:
        UserError: its layers do not stand in one list, or two of an encoder-decoder.
    """
    stacks: dict[str, nn.ModuleList] = {}
    for path in model_layers(base):
        parent = path.rpartition(".")[0]
        if isinstance(found := base.get_submodule(parent), nn.ModuleList):
            stacks[parent] = found
    names = counts_of(base.config)
    if len(stacks) != len(names):
        raise UserError(
            f"{KEY}: expected a model with {len(names)} lists of layers, got {len(stacks)} in {_kind(base.config)}"
        )
    config = base.config if base.config.is_encoder_decoder else base.config.get_text_config()
    decoder_last = sorted(stacks, key=lambda path: len(names) == 2 and "decoder" in path.split("."))
    for name, path in zip(names, decoder_last, strict=True):
        layers = stacks[path]
        kept = kept_of(len(layers), wanted)
        parent, _, last = path.rpartition(".")
        setattr(base.get_submodule(parent), last, nn.ModuleList(layers[number] for number in kept))
        setattr(config, name, len(kept))
        if len(names) == 1 and (kinds := getattr(config, "layer_types", None)) is not None:
            config.layer_types = [kinds[number] for number in kept]


def _kind(config: Any) -> str:
    return str((config.architectures or [config.model_type])[0])
