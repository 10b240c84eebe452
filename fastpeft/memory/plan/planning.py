"""`fastpeft.plan`: what a training will need, and the fastest memory policy that fits, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from ...layers.random_state import RandomState
from ..policy import MemoryPolicy
from ..sizes import gib_above, parse_size
from .adapter import names_layers, section_of
from .choosing import CONTEXT, RECOMPUTE, RESERVE, Need, choose, least_host, need
from .largest import MOST_TOKENS, beyond, check_tokens, largest_of, most_of
from .loaded import model_of_loaded
from .media import pictures_of
from .optimizer_state import OPTIMIZERS
from .predicting import Model, Setting
from .rendering import render
from .sound import check_seconds
from .timing import Rates

METHODS = ("lora", "qlora", "full")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Plan:
    """A prediction; str() shows it.

    Attributes:
        model: its name.
        fits: whether `need.total` and `need.host` are within what there is.
        gpu_memory, host_memory: bytes; None where nothing was said of the host's.
        bytes: by component, on the GPU; "total" is the predicted peak, context and reserve included.
        need: the same in parts, with the policy and its time.
        largest_sequence, largest_batch: tokens and rows that would fit, with recomputed layers; 0 for none, None where
            it was not asked for.
        changes: where it does not fit, up to three changes that would make it fit, the smallest first.
        untraced: parts of the policy whose bytes are told from sizes: "streamed" or nothing.
        notes: what the figures leave out.
        most_sequence, most_batch: as the largest ones, with any policy.
        rates: that times are told from.
        least_host: bytes of the host's memory with which it would fit, where only these are short; else None.
    """

    model: str
    fits: bool
    gpu_memory: int
    host_memory: int | None
    settings: dict[str, Any]
    bytes: dict[str, int]
    need: Need
    largest_sequence: int | None
    largest_batch: int | None
    changes: tuple[str, ...]
    untraced: tuple[str, ...]
    notes: tuple[str, ...]
    most_sequence: int | None = None
    most_batch: int | None = None
    rates: Rates = field(default_factory=Rates)
    least_host: int | None = None

    @property
    def policy(self) -> MemoryPolicy:
        """Of every layer; `accelerate(memory=...)` takes the plan itself, too."""
        return self.need.policy

    def to_dict(self) -> dict[str, Any]:
        """Of numbers, strings and lists alone; sizes in bytes."""
        found = {key: value for key, value in asdict(self).items() if key != "need"}
        layers = self.policy.layers
        found["policy"] = [asdict(layer) for layer in (layers if isinstance(layers, tuple) else (layers,))]
        found["saved"] = list(self.need.saved)
        found["weights_in_host_memory"] = self.policy.host_memory
        found |= {"hidden_from": self.need.hidden_from, "read_hidden_from": self.need.read_hidden_from}
        return found | {"slowdown": self.need.slowdown, "peak_in": self.need.when, "schema": 1}

    def __str__(self) -> str:
        return render(self)


def plan(
    name_or_config: Any,
    *,
    gpu_memory: str | int,
    seq: int,
    batch: int = 1,
    host_memory: str | int | None = None,
    rank: int = 16,
    method: Literal["lora", "qlora", "full"] = "qlora",
    targets: str | list[str] = "all-linear",
    dtype: str = "bfloat16",
    optimizer: str = "adamw_torch",
    task: str = "auto",
    policy: MemoryPolicy | None = None,
    largest: bool = True,
    rates: Rates | None = None,
    trust_remote_code: bool = False,
    accumulation: int | None = None,
    images: int = 0,
    image_size: int | tuple[int, int] | None = None,
    seconds: float | None = None,
    adapter: Any = None,
) -> Plan:
    """Predict the memory of a training with `accelerate` from a configuration, and choose each layer's policy.

    Static bytes are counted on a model without values; what a step makes is followed through the model's own code, run
    without values as it would run on a GPU, for the first layers of each stack, and composed for all of them. Random
    numbers are afterwards what they were.

    Args:
        name_or_config: transformers' configuration, a folder with a config.json, an ID on the hub, or one of
            `fastpeft.memory.plan.known.KNOWN`. No weights are read. Or a loaded model of transformers with an adapter
            of PEFT's LoRA: rank, method, targets, dtype and task are then the model's, and its bytes are counted.
        gpu_memory, host_memory: "24GiB", "24GB" or bytes; no `host_memory` stands for as much as is wanted. Where it
            ends first, streamed 4-bit weights wait on the disk: the policy's own `host_memory` then says how many bytes
            of them do not. Of a loaded model those that are mapped.
        seq, batch: tokens a row, and rows, of one forward pass. Rows may go beyond the last position of a model with
            rotary embeddings, which a note then says.
        rank, targets: of LoRA, as PEFT takes them.
        method: "qlora" keeps frozen linear layers as nested NF4; "full" trains all weights, in `dtype`, without LoRA.
        dtype: "bfloat16", "float16" or "float32", of weights and of autocast.
        optimizer: one of `optimizer_state.OPTIMIZERS`.
        task: one of `tasks.AUTO`, or "auto" for what the configuration says.
        policy: predict this one rather than choose.
        largest: find the largest context and batch, too, with recomputed layers and with any policy.
        rates: what times are told from.
        accumulation: forward passes of one step, as gradient_accumulation_steps. With 1 there are no gradients of an
            earlier one; they are counted if left out.
        images: pictures of each row, of a model that sees; their tokens are among `seq`.
        image_size: height and width of each, or both; what the model takes if left out, and 1024 where it takes any.
        seconds: of each row, of a model that hears; 30 if left out. Of Whisper `seq` is what it writes.
        adapter: PEFT's LoraConfig, in place of rank and targets: DoRA, modules trained whole, trainable tokens and all.

    Raises:
        ValueError: an argument is none of these, or the adapter does not fit the model.
        fastpeft.errors.UserError: the configuration cannot be had.
        ImportError: bitsandbytes is missing, with "qlora".
    """
    capacity, host = parse_size(gpu_memory, "gpu_memory"), None
    if host_memory is not None:
        host = parse_size(host_memory, "host_memory")
    generators = RandomState(())
    try:
        model: Model
        if isinstance(name_or_config, nn.Module):
            given = {"rank": (rank, 16), "method": (method, "qlora"), "targets": (targets, "all-linear")}
            given |= {"dtype": (dtype, "bfloat16"), "task": (task, "auto"), "adapter": (adapter, None)}
            _check_left_out(given, "a loaded model")
            _check_numbers(seq, batch, 1, optimizer, accumulation)
            pictures = pictures_of(images, image_size)
            check_seconds(seconds)
            name, model = model_of_loaded(name_or_config, seq, batch, optimizer, accumulation, pictures, seconds)
        else:
            name, model = model_of(
                name_or_config, seq, batch, rank, method, targets, dtype, optimizer, task, trust_remote_code,
                accumulation, images, image_size, seconds, adapter,
            )  # fmt: skip
        return plan_on(name, model, capacity, host, policy, largest, rates or Rates())
    finally:
        generators.put_back()


def model_of(
    name_or_config: Any,
    seq: int,
    batch: int,
    rank: int,
    method: str,
    targets: str | list[str],
    dtype: str,
    optimizer: str,
    task: str,
    trust_remote_code: bool = False,
    accumulation: int | None = None,
    images: int = 0,
    image_size: int | tuple[int, int] | None = None,
    seconds: float | None = None,
    adapter: Any = None,
) -> tuple[str, Model]:
    """The name and what is traced, for any number of `plan_on`."""
    import torch

    from fastpeft.config import LoraSection, ModelSection
    from fastpeft.integrations.versions import require_core
    from fastpeft.models.bases import load_config
    from fastpeft.models.tasks import AUTO, MEDIA, planned_task

    from .known import KNOWN, known_config

    require_core()
    _check_numbers(seq, batch, rank, optimizer, accumulation)
    check_seconds(seconds)
    for key, one, among in (
        ("method", method, METHODS),
        ("dtype", dtype, DTYPES),
        ("task", task, ("auto", *AUTO, *MEDIA)),
    ):
        _check_one_of(key, one, among)
    if not isinstance(name_or_config, str):
        name, config = name_or_config.model_type, name_or_config
    elif name_or_config.lower() in KNOWN:
        name, config = name_or_config.lower(), known_config(name_or_config.lower())
    else:
        name = name_or_config
        config = load_config(ModelSection(name=name, trust_remote_code=trust_remote_code), "MODEL")
    check_tokens(seq, config)
    task = planned_task(config, images > 0) if task == "auto" else task
    section: LoraSection | None = LoraSection(r=rank, alpha=2 * rank, target_modules=targets)
    if method == "full":
        own = {"rank": (rank, 16), "targets": (targets, "all-linear"), "adapter": (adapter, None)}
        _check_left_out(own, "a training of all weights")
        section = None
    if adapter is not None:
        _check_left_out({"rank": (rank, 16), "targets": (targets, "all-linear")}, "the adapter")
        section = section_of(adapter, task=task, key="adapter")
    setting = Setting(
        config,
        task,
        seq,
        batch,
        method == "qlora",
        getattr(torch, dtype),
        section,
        optimizer,
        accumulated=accumulation != 1,
        pictures=pictures_of(images, image_size),
        seconds=seconds,
        full=method == "full",
    )
    return name, Model(setting, whole=adapter is not None and section is not None and names_layers(section))


def _check_left_out(given: dict[str, tuple[Any, Any]], who: str) -> None:
    """Raises ValueError for an argument, with its default, that `who` says already."""
    for key, (one, default) in given.items():
        if one != default:
            raise ValueError(f"{key}: expected to be left out, {who} has its own")


def _check_numbers(seq: int, batch: int, rank: int, optimizer: str, accumulation: int | None) -> None:
    numbers = [("seq", seq, MOST_TOKENS), ("batch", batch, MOST_TOKENS), ("rank", rank, 1 << 16)]
    numbers += [] if accumulation is None else [("accumulation", accumulation, MOST_TOKENS)]
    for key, value, most in numbers:
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{key}: expected 1 to {most}, got {value!r}")
    _check_one_of("optimizer", optimizer, tuple(OPTIMIZERS))


def _check_one_of(key: str, value: str, among: Sequence[str]) -> None:
    if value not in among:
        raise ValueError(f"{key}: expected one of {', '.join(among)}, got {value!r}")


def plan_on(
    name: str, model: Model, capacity: int, host: int | None, policy: MemoryPolicy | None, largest: bool, rates: Rates
) -> Plan:
    """The plan of a model for one size of GPU."""
    setting = model.setting
    rows, tokens = setting.rows, setting.tokens
    if policy is None:
        found = choose(model, rows, tokens, capacity, host, rates)
    else:
        found = need(model, policy, rows, tokens, capacity, rates, host)
    fits = found.total <= capacity and (host is None or found.host <= host)
    sizes: list[tuple[int, int] | tuple[None, None]] = [(None, None)] * 2
    if largest:
        sizes = [largest_of(model, (RECOMPUTE,), capacity, host), most_of(model, capacity, host)]
    (longest, most), (longest_of_all, most_of_all) = sizes
    if fits and largest:  # found with layers that all do the same; a mix may fit where the host's memory ends first
        longest_of_all, most_of_all = max(longest_of_all or 0, tokens), max(most_of_all or 0, rows)
    rank = 0 if setting.section is None else setting.section.r
    settings = {
        "seq": tokens, "batch": rows, **({} if setting.full else {"rank": rank}),
        "method": "full" if setting.full else "qlora" if setting.packed else "lora",
        "dtype": str(setting.dtype)[6:], "optimizer": setting.optimizer, "task": setting.task,
        **({} if setting.accumulated else {"accumulation": 1}), **model.batches.described(),
    }  # fmt: skip
    enough = None
    if not fits and found.total <= capacity:
        enough = least_host(model, policy, rows, tokens, capacity, rates)
    changes = () if fits else _changes(found, tokens, rows, longest_of_all, most_of_all, enough)
    return Plan(
        name, fits, capacity, host, settings, components(model, found, capacity), found, longest, most, changes,
        () if found.hidden_from is None else ("streamed",), notes(model, found.policy), longest_of_all, most_of_all,
        rates, enough,
    )  # fmt: skip


def components(model: Model, found: Need, capacity: int) -> dict[str, int]:
    """Bytes on the GPU by what they are for, at the moment of the peak; and on the host."""
    sizes, policy = model.bytes, found.policy
    seen = model.batches.nbytes(model.setting.rows)
    layers = zip(model.streamed, policy.of(len(model.skeleton.order)), strict=True)
    turns = sorted((parts for parts, each in layers if each.streamed), key=sum)
    away = turns[: -policy.ring]
    return {
        "base, packed": sizes["packed"] - sum(packed for packed, _ in away),
        "base, dense": sizes["dense"] - sum(dense for _, dense in away),
        ("trained weights" if model.setting.full else "adapters"): sizes["trained"],
        "gradients": model.gradients + found.gradients,
        "optimizer": model.optimizer,
        "buffers": sizes["buffer"],
        **({("sound" if model.batches.hears else "pictures"): seen} if seen else {}),
        **({"teacher": sizes["teacher"]} if "teacher" in sizes else {}),
        "saved activations": found.kept - found.gradients,
        "working memory": (working := found.step - found.kept),
        "of it, decoded weights": dict(found.purposes).get("decoded weights", 0),
        "of it, attention": dict(found.purposes).get("attention", 0),
        "of it, loss": working if found.when in ("loss", "turn") else 0,
        "CUDA context": CONTEXT,
        "fragments": int(RESERVE * capacity),
        "total": found.total,
        "host": found.host,
        **({"disk": found.disk} if found.disk else {}),
        "of it, loss alone": found.loss,
        "of it, one layer alone": found.working,
    }


def notes(model: Model, policy: MemoryPolicy) -> tuple[str, ...]:
    found = ["rows without padding; evaluation and saving are not counted"]
    found += beyond(model.setting)
    own = [p for module in model.skeleton.model.modules() if not isinstance(module, nn.Conv1d)
           for p in module._parameters.values()]  # fmt: skip
    if any(p is not None and len(p.shape) == 3 for p in own):
        found.append("experts: every one is taken to get as many tokens")
    if policy.host_memory is not None:
        found.append("weights wait on the disk: load the model with mapped=True, as fastpeft train does")
    if any(layer.tile for layer in policy.different):
        found.append("MLPs in tiles: gradients of their adapters are equal to rounding, not to the bit")
    if not model.skeleton.layers:
        found.append("this family has no layers that transformers recomputes: one policy for all")
    if model.setting.others:
        found.append(f"{1 + len(model.setting.others)} adapters are counted; a batch is followed through the first one")
    if first := [str(place) for place, layer in enumerate(model.skeleton.order) if model.sees(layer)]:
        what = "hear the recordings" if model.batches.hears else "see the pictures"
        found.append(f"layers {first[0]}-{first[-1]} are those that {what}")
    elif model.setting.task == "image-text-to-text":
        found.append("rows of text alone; with images their pictures are counted too")
    found += model.setting.notes
    return tuple(found)


def _changes(
    found: Need, tokens: int, rows: int, longest: int | None, most: int | None, host: int | None
) -> tuple[str, ...]:
    """What would make it fit; `host`: how much of the host's memory would, where only that is short."""
    changes = []
    if most and most < rows:
        changes.append(f"batch {most} rather than {rows}, with more gradient accumulation: the same result")
    if longest and longest < tokens:
        changes.append(f"seq {longest} rather than {tokens}")
    if host is not None:
        changes.append(f"host memory of {gib_above(host):.2f} GiB")
    else:
        changes.append(f"a GPU of {-(-found.total // 2**30)} GiB")
    return tuple(changes[:3])
