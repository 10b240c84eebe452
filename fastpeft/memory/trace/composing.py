"""From the traced first layers of a model to the memory of a whole step, each layer under its own policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..policy import LayerPolicy
from .timeline import Stretch

Traces = dict[LayerPolicy, list[Stretch]]
"""A trace in which every layer does the same, for each policy."""


def sampled(count: int, order: Sequence[int], policies: Sequence[LayerPolicy]) -> tuple[LayerPolicy, ...]:
    """What each of `count` traced layers does where the whole model's do this: as the last that it stands for.

    The first layers stand for themselves. What a model's own code holds until its last layer is done, such as the
    embeddings' result, is freed then, or kept by the first layer: it takes both to follow that.
    """
    found = [policies[-1]] * count
    for traced, policy in zip(order, policies, strict=True):
        found[traced] = policy
    return tuple(found)


class Peak(NamedTuple):
    """The most that is alive at a time.

    Attributes:
        size: bytes beside what lies there all the time.
        when: the phase of the stretch, see `timeline.Stretch`.
        kept: bytes of `size` that were kept from stretch to stretch; the others are working memory of that one.
        layers: bytes that all layers keep for backward.
        loss, working: working memory of the loss, and the most of a layer.
        gradients: bytes of `kept` that are parameters' gradients.
        purposes: (purpose, bytes) of what is not kept, as far as it has one.
        saved: by how many bytes each layer's forward lets grow what is kept.
    """

    size: int
    when: str
    kept: int
    layers: int
    loss: int
    working: int
    gradients: int = 0
    purposes: tuple[tuple[str, int], ...] = ()
    saved: tuple[int, ...] = ()


def compose(
    traces: Traces, order: Sequence[int], policies: Sequence[LayerPolicy], mixed: Sequence[Stretch] | None = None
) -> Peak:
    """The step of the whole model.

    Args:
        order: for each layer, in the order of modules, the traced layer that stands for it.
        policies: of each layer.
        mixed: a trace of what is `sampled` of these, from which all that is no layer is taken, and the layers too where
            each stands for itself; None where all do the same.
    """
    level, best = 0, Peak(0, "begin", 0, 0, 0, 0)
    layers = loss = working = gradients = 0
    for stretch in _whole(traces, order, policies, mixed):
        if level + stretch.peak > best.size:
            best = best._replace(
                size=level + stretch.peak, when=stretch.phase, kept=level, gradients=gradients,
                purposes=stretch.purposes,
            )  # fmt: skip
        if stretch.phase == "forward":
            layers += stretch.change
        if stretch.phase in ("loss", "turn"):
            loss = max(loss, stretch.peak)
        elif stretch.phase != "begin":
            working = max(working, stretch.peak)
        level += stretch.change
        gradients += stretch.gradients
    saved = tuple(map(_saved(traces), order, policies))
    return best._replace(layers=layers, loss=loss, working=working, saved=saved)


def _saved(traces: Traces) -> Callable[[int, LayerPolicy], int]:
    """By how much what is kept grows with a traced layer under a policy."""
    known: dict[tuple[int, LayerPolicy], int] = {}
    for policy, stretches in traces.items():
        for index, stretch in enumerate(stretches):
            if stretch.phase == "forward":
                whole = stretches[index : index + _until_next(stretches, index)]
                known[stretch.layer, policy] = sum(each.change for each in whole)
    return lambda layer, policy: known.get((layer, policy), 0)  # a batch of text reaches no layer of an image encoder


def _whole(
    traces: Traces, order: Sequence[int], policies: Sequence[LayerPolicy], mixed: Sequence[Stretch] | None
) -> list[Stretch]:
    """The stretches of every layer, in order of time."""
    if mixed is not None and len(set(order)) == len(order):  # every layer was traced, as it is
        return list(mixed)
    uses: dict[int, list[tuple[LayerPolicy, LayerPolicy]]] = {}
    """Of each traced layer: (policy, that of the next layer) of those that it stands for."""
    for traced, policy, following in zip(order, policies, [*policies[1:], *policies[-1:]], strict=True):
        uses.setdefault(traced, []).append((policy, following))
    first = next(iter(traces.values()))
    between = first if mixed is None else mixed
    sample = () if mixed is None else sampled(max(order) + 1, order, policies)
    found: list[Stretch] = []
    index = 0
    while index < len(first):
        stretch = first[index]
        wanted = uses.get(stretch.layer, []) if stretch.phase in ("forward", "backward") else []
        if not wanted:
            found.append(between[index])
            index += 1
            continue
        length = 1 if stretch.phase == "backward" else _until_next(first, index)
        for policy, following in wanted if stretch.phase == "forward" else wanted[::-1]:
            found.append(traces[policy][index])
            alike = sample[stretch.layer : stretch.layer + 2] == (policy, following)  # both do in `mixed`
            found += (between if alike else traces[following])[index + 1 : index + length]
        index += length
    return found


def _until_next(stretches: Sequence[Stretch], index: int) -> int:
    """How many from a layer's forward on are before the next layer's, which may be part of that: transformers of 5.17
    and around checkpoint a layer outside the hooks that part the step. One where what follows is no layer."""
    after = stretches[index + 1 : index + 3]
    between = [each.phase for each in after] == ["loss", "forward"] and after[0].layer == stretches[index].layer
    return 2 if between else 1
