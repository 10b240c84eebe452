"""What one training needs, from a configuration alone: what lies there all the time, and the traced step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastpeft.config import LoraSection
from fastpeft.errors import UserError

from ..layers import model_layers
from ..policy import LayerPolicy, MemoryPolicy
from ..streaming.stowing import SMALLEST
from ..trace.composing import Peak, compose, sampled
from ..trace.live import LiveBytes, rounded
from ..trace.repeated import Repeated
from ..trace.skeleton import Skeleton, build, follow, stored
from ..trace.timeline import Stretch, less, more, trace
from .batches import Batches
from .given import SEEN, Given
from .media import Pictures
from .optimizer_state import state_sizes
from .timing import Work, work_of

T = TypeVar("T")
_STATE = "optimizer's state"

WARM = 32
"""Tokens of the call before the first that is traced."""


@dataclass(frozen=True)
class OtherAdapter:
    """One more adapter on the modules that the first is on, with gradients of its own.

    Attributes:
        rank: of LoRA.
        follows: its matrices get the first one's values after each step, so that the optimizer keeps nothing for them.
        head_follows: the same of its copy of what is trained whole.
    """

    rank: int
    follows: bool = False
    head_follows: bool = False


@dataclass(frozen=True)
class Setting:
    """A training.

    Attributes:
        packed: frozen linear layers as nested NF4.
        dtype: of the frozen rest, and of autocast if it has 16 bits.
        device: "cuda" or "cpu", whose implementations are followed.
        section: the adapter; None for a model that is asked alone, without gradients, or that is trained whole.
        full: all weights are trained, in `dtype`.
        accumulated: whether gradients of an earlier batch are there in forward, as with gradient accumulation. Those of
            further adapters always are.
        others: further adapters; a batch is followed through the first one.
        teacher: a model that answers the same rows before each forward pass, and
        teacher_streamed: whether its layers' weights are in host memory, and take turns on the device.
        notes: what is left out of such a training, in words.
        pictures: of each row, of a model that sees; None for rows of text.
        seconds: of each recording, of a model that hears; None for the usual ones.
        given: what the model was called with, in place of rows, tokens and these two: nothing else is planned then.
    """

    config: Any
    task: str
    tokens: int
    rows: int
    packed: bool
    dtype: torch.dtype
    section: LoraSection | None
    optimizer: str = "adamw_torch"
    device: str = "cuda"
    accumulated: bool = True
    others: tuple[OtherAdapter, ...] = ()
    teacher: Setting | None = None
    teacher_streamed: bool = False
    notes: tuple[str, ...] = ()
    pictures: Pictures | None = None
    seconds: float | None = None
    full: bool = False
    given: Given | None = None

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.full or self.section is not None


class Span(NamedTuple):
    """What a layer gets: so many sequences of positions with features."""

    sequences: int
    positions: int
    width: int

    @property
    def all(self) -> int:
        """Positions of all sequences."""
        return self.sequences * self.positions


@dataclass
class Model:
    """A skeleton, and its traces by (rows, tokens, what its layers do): each is made when it is first wanted.

    Attributes:
        whole: every layer is traced, not only the first ones: exact for any policies, and slower.
        bytes: that lie there all the time, by the kinds of `skeleton.stored`, and those of a "teacher".
        host: bytes of a teacher that are in host memory.
        streamed: (packed, dense) bytes of each layer's weights, if it is streamed.
        mapped: of these those that may wait on the disk, in the files of 4-bit weights.
        work: of each traced layer.
        batches: that it is given.
    """

    setting: Setting
    whole: bool = False
    skeleton: Skeleton = field(init=False)
    bytes: dict[str, int] = field(init=False)
    optimizer: int = field(init=False)
    streamed: tuple[tuple[int, int], ...] = field(init=False)
    mapped: tuple[int, ...] = field(init=False)
    work: tuple[Work, ...] = field(init=False)
    batches: Batches = field(init=False)
    host: int = field(init=False, default=0)
    _teacher: Model | None = field(init=False, default=None)
    _traces: dict[tuple[int, int, tuple[LayerPolicy, ...]], list[Stretch]] = field(default_factory=dict)
    _is_warm: bool = False
    _spans: dict[int, Span] = field(default_factory=dict)
    _first: dict[LayerPolicy, list[Stretch]] = field(default_factory=dict)
    _next: dict[LayerPolicy, list[Stretch]] = field(default_factory=dict)
    _repeated: Repeated = field(default_factory=Repeated)

    def __post_init__(self) -> None:
        s = self.setting
        self.skeleton = build(s.config, s.task, s.dtype, s.packed, s.section, self.whole, s.full)
        layers = [self.skeleton.model.get_submodule(path) for path in self.skeleton.layers]
        all_of = self._count(stored(self.skeleton.model))
        of_layers = [self._count(stored(layer)) for layer in layers]
        extra = [0] * len(layers)
        for index in self.skeleton.order:
            extra[index] += 1
        for layer, uses in zip(of_layers, extra, strict=True):
            for kind, size in layer.items():
                all_of[kind] += (uses - 1) * size
        for kind, size in self._of_others().items():
            all_of[kind] += size
        self.optimizer = all_of.pop(_STATE)
        self.bytes = all_of
        streamed = [self._count(each for each in stored(layer) if is_streamed(*each)) for layer in layers]
        self.streamed = tuple((streamed[i]["packed"], streamed[i]["dense"]) for i in self.skeleton.order)
        self.mapped = tuple(packed for packed, _ in self.streamed)
        self.work = tuple(work_of(layer, s.config.get_text_config()) for layer in layers)
        self.batches = self._followed(lambda: Batches(s, self.skeleton.model))
        if s.teacher is not None:
            self._teacher = Model(s.teacher)
            self._count_teacher(self._teacher)

    def _count(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        live = LiveBytes(self.setting.device)
        sizes = dict.fromkeys(("packed", "dense", "trained", "buffer", _STATE), 0)
        for kind, tensor in tensors:
            sizes[kind] += (new := live.add([tensor]))
            if kind == "trained" and new:
                each = tensor.itemsize if self.setting.full else 4
                state = state_sizes(self.setting.optimizer, tensor.numel(), self.setting.device, each)
                sizes[_STATE] += sum(rounded(size, self.setting.device) for size in state)
        return sizes

    def _of_others(self) -> dict[str, int]:
        """Bytes of further adapters' values, and of the optimizer's state for them."""
        section, sizes = self.setting.section, {"trained": 0, _STATE: 0}
        if section is None or not self.setting.others:
            return sizes
        uses = [self.skeleton.order.count(place) for place in range(len(self.skeleton.layers))]
        inside = [f"{path}." for path in self.skeleton.layers]
        for name, parameter in self.skeleton.model.named_parameters():
            if not parameter.requires_grad:
                continue
            count = next((use for use, path in zip(uses, inside, strict=True) if path in name), 1)
            for other in self.setting.others:
                matrix = "lora_" in name
                elements = parameter.numel() * other.rank // section.r if matrix else parameter.numel()
                sizes["trained"] += count * rounded(elements * parameter.itemsize, self.setting.device)
                if not (other.follows if matrix else other.head_follows):
                    state = state_sizes(self.setting.optimizer, elements, self.setting.device)
                    sizes[_STATE] += count * sum(rounded(size, self.setting.device) for size in state)
        return sizes

    def _count_teacher(self, teacher: Model) -> None:
        whole, layers = sum(teacher.bytes.values()), teacher.streamed_bytes
        turns = sum(sorted(layers)[-MemoryPolicy().ring :])
        self.host = sum(layers) if self.setting.teacher_streamed else 0
        self.bytes["teacher"] = whole - self.host + (turns if self.host else 0)

    @property
    def streamed_bytes(self) -> tuple[int, ...]:
        return tuple(map(sum, self.streamed))

    @property
    def gradients(self) -> int:
        """Bytes of those that are there in forward already; what else is followed with the step."""
        return self.bytes["trained"] if self.setting.accumulated else self._of_others()["trained"]

    def peak(self, policies: Sequence[LayerPolicy], rows: int, tokens: int) -> Peak:
        """Of one step, beside what lies there all the time; where streamed weights are makes no difference to it."""
        resident = [replace(each, streamed=False) for each in policies]
        order, count = self.skeleton.order, len(self.skeleton.layers)
        alike = dict.fromkeys(resident or [LayerPolicy()])
        traces = {each: self._traced((each,) * count, rows, tokens) for each in alike}
        mixed = self._traced(sampled(count, order, resident), rows, tokens) if len(alike) > 1 else None
        found = compose(traces, order, resident, mixed)
        if self._teacher is None:
            return found
        asked = self._teacher.peak((LayerPolicy(),) * len(self._teacher.skeleton.order), rows, tokens)
        config = self._teacher.setting.config.get_text_config()
        told = rows * tokens * config.hidden_size * self._teacher.setting.dtype.itemsize + asked.loss
        if asked.size > found.size + told:
            return asked._replace(when="teacher")
        return found._replace(size=found.size + told, kept=found.kept + told)

    def sees(self, layer: int) -> bool:
        """Whether a traced layer gets pictures or sound rather than a row's tokens."""
        if self.batches.count(1):
            self._warm((LayerPolicy(),) * len(self.skeleton.layers), self.setting.tokens)
        return layer in self._spans

    def span(self, layer: int, rows: int, tokens: int) -> Span:
        """What a traced layer gets of a batch."""
        if self.sees(layer):
            own = self._spans[layer]
            return Span(self.batches.count(rows) * own.sequences, own.positions, own.width)
        text = self.setting.config.get_text_config()
        return Span(rows, tokens, int(getattr(text, "hidden_size", None) or text.d_model))

    def spans(self, rows: int, tokens: int) -> list[Span]:
        """The same of each layer of the whole model."""
        found = [self.span(layer, rows, tokens) for layer in range(len(self.skeleton.layers))]
        return [found[layer] for layer in self.skeleton.order]

    def _traced(self, policies: tuple[LayerPolicy, ...], rows: int, tokens: int) -> list[Stretch]:
        key = (rows, tokens, policies)
        if key not in self._traces:
            self._warm(policies, tokens)
            self._traces[key] = self._whole(policies, rows, tokens)
        return self._traces[key]

    def _warm(self, policies: tuple[LayerPolicy, ...], tokens: int) -> None:
        """Which projections share an input is learned in the first call."""
        if self._is_warm:
            return
        self._is_warm = True
        few = min(tokens, max(WARM, self.batches.least))
        with self._seen(self.setting.rows * tokens if self.setting.given is not None else few):
            self._trace(policies, 1, few, min(self.batches.pictures, 1))

    def _whole(self, policies: tuple[LayerPolicy, ...], rows: int, tokens: int) -> list[Stretch]:
        """Of many pictures told from one and two, small ones where they may be, and a whole one: each takes as much as
        the one before, whatever the text around it, and layers of each policy as much as where all have it."""
        pictures = rows * self.batches.pictures
        shrinks = self.batches.shrinks
        least = small = self._trace(policies, rows, tokens, min(pictures, 1), small=shrinks)
        if not pictures:
            return small
        alike = {each: (each,) * len(policies) for each in set(policies)}
        if shrinks:
            for each, all_do in alike.items():
                if each not in self._first:
                    few = least if all_do == policies else self._trace(all_do, rows, tokens, 1, small=True)
                    self._first[each] = less(self._trace(all_do, rows, tokens, 1), few)
            small = more(small, self._by_layer(self._first, policies, small), 1)
        if pictures == 1:
            return small
        for each, all_do in alike.items():
            if each not in self._next:
                two = self._trace(all_do, rows, tokens, 2, small=shrinks)
                one = least if all_do == policies else self._trace(all_do, rows, tokens, 1, small=shrinks)
                found = less(two, one)
                self._next[each] = more(found, self._first[each], 1) if shrinks else found
        return more(small, self._by_layer(self._next, policies, small), pictures - 1)

    def _by_layer(
        self, found: dict[LayerPolicy, list[Stretch]], policies: Sequence[LayerPolicy], stretches: Sequence[Stretch]
    ) -> list[Stretch]:
        """Of each stretch what was found where all layers do as its own."""
        return [found[policies[each.layer]][index] for index, each in enumerate(stretches)]

    def _trace(
        self, policies: tuple[LayerPolicy, ...], rows: int, tokens: int, pictures: int, small: bool = False
    ) -> list[Stretch]:
        model: Any = self.skeleton.model
        if layers := model_layers(model):
            follow(model, policies)
        dtype = self.setting.dtype
        batch = self.batches.of(rows, tokens, pictures, small)
        return self._followed(
            lambda: trace(
                model,
                layers,
                batch,
                self.setting.device,
                autocast=dtype if dtype.itemsize == 2 else None,
                accumulated=self.setting.accumulated,
                repeated=self._repeated,
                backward=self.setting.trains,
                there=SEEN,
            )
        )

    @contextmanager
    def _seen(self, tokens: int) -> Iterator[None]:
        """Notes what layers get that are given no row of so many tokens, but a picture or a recording."""
        handles = []

        def note(index: int, hidden: Tensor) -> None:
            width = hidden.shape[-1]
            if (positions := hidden.numel() // width) != tokens:
                sequences = len(hidden) if self.setting.given is not None and hidden.dim() == 3 else 1
                self._spans[index] = Span(sequences, positions // sequences, width)

        def watch(index: int) -> Callable[..., None]:
            return lambda module, args, kwargs: note(index, args[0] if args else kwargs["hidden_states"])

        for index, path in enumerate(self.skeleton.layers if self.batches.count(1) else ()):
            layer = self.skeleton.model.get_submodule(path)
            handles.append(layer.register_forward_pre_hook(watch(index), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _followed(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # of any kind, from a model's own code
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
            raise UserError(f"MODEL: its step cannot be followed without values, so no plan is made: {why}") from error


def is_streamed(kind: str, tensor: Tensor) -> bool:
    """Whether a streamed layer has this in host memory: frozen matrices, and scales of packed ones."""
    matrix = kind == "dense" and tensor.dim() > 1
    return (matrix or kind == "packed") and tensor.nbytes >= SMALLEST
