"""What a model's and an adapter's files say, looked at before a library acts on it: they may come from anybody.

Numbers are limited where the libraries would make so many of something, or something so large, without asking how much
there is; what would fetch or run code is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MOST_LAYERS = 1024
MOST_PARTS = 1 << 14
"""Of experts, and of other parts of a model of which there are many."""
MOST_FEATURES = 1 << 24
"""Of a dimension: features, words, positions. Models of 2026 have up to ten million positions."""
MOST_BEAMS = 256
MOST_STEPS = 64
"""Of the iterations with which an adapter's first values are found anew when it is loaded (PiSSA, LoftQ)."""
MOST_RANK = 1 << 12
"""Of an adapter, whatever its base: modules of so many values are made before a file's are read."""
LONGEST_PATTERN = 2000
FEW = 1 << 22
"""Values that any adapter may hold; more, only in proportion to its base."""

_LIMITS = (
    (re.compile(r"(^|_)(layers?|blocks|depths?)$"), MOST_LAYERS),
    (
        re.compile(r"(^|_)(experts|groups?|group_num|networks|functions|codebooks|quantizers|stages|cycles|ngram)$"),
        MOST_PARTS,
    ),
    (
        re.compile(r"(^|_)(size|dim|heads|embeddings|positions|features|channels|rank|labels)$|^(d|n)_\w+$"),
        MOST_FEATURES,
    ),
)
_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "target_parameters")
_RANKS = ("r", "init_r", "target_r", "num_virtual_tokens", "num_vectors")
_CONTAINERS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("modules_to_save", (list, tuple, set), "a list"),
    ("rank_pattern", (dict,), "a mapping"),
    ("alpha_pattern", (dict,), "a mapping"),
)
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")


def check_base(name: str, key: str, trusted: bool, **where: Any) -> None:
    """Look at a base model's files before transformers does.

    Args:
        name: folder or hub ID.
        key: what to call it in messages.
        trusted: whether it may name code of its own.
        where: as `from_pretrained` takes it: revision, local_files_only and the like.

    Raises:
        UserError: its config.json asks for more than a model, see `check_config`; or an adapter lies beside it, which
            transformers would load too.
        OSError, ValueError: it has no config.json that can be read.
    """
    from transformers import PreTrainedConfig
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(name, **where) is not None:
        raise UserError(f"{key}: expected a base model alone, got one with an adapter beside it: {name}")
    values = PreTrainedConfig.get_config_dict(name, **where)[0]
    if isinstance(values, dict):  # of others the library says what is wrong
        check_config(values, key, trusted)


def check_config(config: Mapping[str, Any], key: str, trusted: bool) -> None:
    """Look at what is in a config.json.

    Args:
        config: as it was read, before transformers makes anything of it.
        key: what the user calls the model.
        trusted: whether code that comes with the model, or that it names, may run.

    Raises:
        UserError: a number beyond any model's, architectures that are no list of names, or an implementation that would
            be fetched from the hub and run.
    """
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        raise UserError(f"{key}: architectures of its config.json: expected a list of names, got {classes!r}")
    for name, value in _leaves(config, ""):
        last = name.rpartition(".")[2]
        if any(part in _CODE for part in name.split(".")) and isinstance(value, str) and "/" in value and not trusted:
            raise UserError(f"{key}: {name}: {value!r} is code from the hub, which runs only with trust_remote_code")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = next((most for pattern, most in _LIMITS if pattern.search(last)), None)
            if limit is not None and not abs(value) <= limit:
                raise UserError(f"{key}: {name} of its config.json: expected at most {limit}, got {_short(value)}")


def check_generation(settings: Any, key: str) -> None:
    """Raise UserError if a model's own generation settings ask for more answers at once than anyone reads."""
    for name in ("num_beams", "num_return_sequences", "num_beam_groups"):
        value = getattr(settings, name, None)
        if value is not None and (not isinstance(value, (int, float)) or not value <= MOST_BEAMS):
            raise UserError(
                f"{key}: {name} of its generation_config.json: expected at most {MOST_BEAMS}, got {_short(value)}"
            )


def check_adapter_config(config: Any, key: str) -> None:
    """Look at an adapter's configuration.

    Args:
        config: PEFT's.
        key: what the user calls the adapter.

    Raises:
        UserError: it is made of other adapters, runs long before it has values, or its patterns could match for ever.
    """
    said = f"{key}: adapter_config.json: "
    if str(getattr(config.peft_type, "value", config.peft_type)) == "XLORA":
        raise UserError(f"{said}X-LoRA is made of other adapters, which are not fetched")
    for name, kind, what in _CONTAINERS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{said}{name}: expected {what}, got {value!r}")
    for name in _RANKS:
        value = getattr(config, name, None)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UserError(f"{said}{name}: expected a whole number, got {value!r}")
    begun = str(getattr(config, "init_lora_weights", ""))
    steps = begun.rpartition("_")[2] if begun.startswith("pissa_niter_") else "0"
    loftq = getattr(config, "loftq_config", None) or {}
    rounds = getattr(loftq, "loftq_iter", None) or (loftq.get("loftq_iter", 0) if isinstance(loftq, Mapping) else 0)
    for name, number in (("init_lora_weights", steps), ("loftq_config.loftq_iter", rounds)):
        if not str(number).isdigit() or int(number) > MOST_STEPS:
            raise UserError(f"{said}{name}: expected at most {MOST_STEPS} iterations, got {str(number)[:20]}")
    copies = getattr(config, "layer_replication", None) or []
    try:
        layers = sum(last - first for first, last in copies)
    except (TypeError, ValueError):
        raise UserError(f"{said}layer_replication: expected pairs of layers, got something else") from None
    if layers > MOST_LAYERS or len(copies) > MOST_LAYERS:
        raise UserError(f"{said}layer_replication: expected at most {MOST_LAYERS} layers, got more")
    for name, pattern in _patterns(config):
        if len(pattern) > LONGEST_PATTERN or _repeats_repeats(pattern):
            raise UserError(f"{said}{name}: expected names or a plain pattern, got one that could match for ever")


def check_adapter_weights(folder: Path, config: Any, base: Any, key: str) -> None:
    """Look at the header of an adapter's weights before PEFT makes modules for them and reads them.

    Args:
        folder: with `adapter_model.safetensors`.
        config: PEFT's, which was checked.
        base: the model that it belongs to.
        key: what the user calls the adapter.

    Raises:
        UserError: there are no weights in safetensors, their header does not fit their file, they are out of proportion
            to the base, or the configuration's rank is none that they have.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{key}: expected {ADAPTER_WEIGHTS} in {folder}, got none; other files are pickles, never read")
    try:
        with safe_open(file, "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"{key}: {file} cannot be read: {error}") from error
    values = sum(_product(shape) for shape in shapes)
    most = FEW + 16 * sum(parameter.numel() for parameter in base.parameters())  # of which 4-bit ones hold two
    if values > most:
        raise UserError(f"{key}: expected an adapter of at most {most} values for its base, got {values}")
    longest = min(max((size for shape in shapes for size in shape), default=0), max(MOST_RANK, _narrower(base)))
    patterns = getattr(config, "rank_pattern", None) or {}
    for name, rank in [(name, getattr(config, name, None)) for name in _RANKS] + [*patterns.items()]:
        if rank is not None and (not isinstance(rank, int) or rank > longest):
            raise UserError(f"{key}: adapter_config.json: {name}: expected a rank that its weights have, got {rank!r}")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is in mappings and lists; what is in a list has the list's name."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for below in value:
            yield from _leaves(below, name)
    else:
        yield name, value


def _patterns(config: Any) -> Iterator[tuple[str, str]]:
    for name in _PATTERNS:
        value = getattr(config, name, None)
        for one in [value] if isinstance(value, str) else value or ():
            if isinstance(value, str) or name == "layers_pattern":  # others are names
                yield name, str(one)
    for name in ("rank_pattern", "alpha_pattern"):
        for one in getattr(config, name, None) or ():
            yield name, str(one)


def _repeats_repeats(pattern: str) -> bool:
    """Whether a group that repeats something without end is itself repeated: Python's matching of such may not end."""
    bare = re.sub(r"\\.", "a", pattern, flags=re.DOTALL)
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "a", bare)
    open_groups, place = [False], 0
    while place < len(bare):
        if bare[place] == "(":
            open_groups.append(False)
        elif bare[place] == ")" and len(open_groups) > 1:
            inner = open_groups.pop()
            repeated = _UNBOUNDED.match(bare, place + 1) is not None
            if inner and repeated:
                return True
            open_groups[-1] |= inner
        elif _UNBOUNDED.match(bare, place):
            open_groups[-1] = True
        place += 1
    return False


def _narrower(base: Any) -> int:
    """The most that a matrix of the base has of rows and of columns: no adapter's rank is larger."""
    matrices = [(getattr(one, "in_features", 0), getattr(one, "out_features", 0)) for one in base.modules()]
    shapes = [p.shape for p in base.parameters() if p.dim() == 2]
    return max((min(sizes) for sizes in [*matrices, *shapes]), default=0)


def _short(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return repr(value)[:40]
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"one of {value.bit_length()} bits"
    return str(value) if abs(value) < 10**12 else f"{float(value):.0e}"


def _product(shape: list[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
