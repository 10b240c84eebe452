"""Traced layers put together to a whole model, by arithmetic."""

from __future__ import annotations

from fastpeft.memory.policy import LayerPolicy
from fastpeft.memory.trace.composing import compose, sampled
from fastpeft.memory.trace.timeline import Stretch

KEPT, AGAIN = LayerPolicy(), LayerPolicy("recompute")

KEEP = [
    Stretch("begin", -1, 5, 1),
    Stretch("forward", 0, 12, 10),
    Stretch("loss", 0, 0, 0),
    Stretch("forward", 1, 12, 10),
    Stretch("loss", 1, 50, 4),
    Stretch("turn", -1, 6, -2),
    Stretch("backward", 1, 7, -9),
    Stretch("backward", 0, 7, -9),
]
RECOMPUTE = [
    Stretch("begin", -1, 5, 1),
    Stretch("forward", 0, 12, 1),
    Stretch("loss", 0, 0, 0),
    Stretch("forward", 1, 12, 1),
    Stretch("loss", 1, 50, 4),
    Stretch("turn", -1, 6, -2),
    Stretch("backward", 1, 17, 0),
    Stretch("backward", 0, 17, 0),
]


def test_layers_add_up() -> None:
    found = compose({KEPT: KEEP}, (0, 1, 1, 1), (KEPT,) * 4)
    assert (found.size, found.when, found.kept) == (1 + 4 * 10 + 50, "loss", 41)
    assert (found.layers, found.loss, found.working) == (40, 50, 12)


def test_each_layer_under_its_own_policy() -> None:
    found = compose({KEPT: KEEP, AGAIN: RECOMPUTE}, (0, 1, 1, 1), (AGAIN, AGAIN, KEPT, KEPT))
    assert found.size == 1 + 2 * 1 + 2 * 10 + 50


OFFLOAD = [
    Stretch("begin", -1, 5, 1),
    Stretch("forward", 0, 12, 10),
    Stretch("loss", 0, 0, -10),
    Stretch("forward", 1, 12, 10),
    Stretch("loss", 1, 50, -6),
    Stretch("turn", -1, 6, -2),
    Stretch("backward", 1, 17, 0),
    Stretch("backward", 0, 17, 0),
]


def test_what_is_before_the_next_layer_is_that_layers() -> None:
    """transformers of 5.17 and around checkpoint outside the hooks: an input leaves when the next layer's is saved."""
    assert compose({AGAIN: OFFLOAD}, (0, 0, 0, 1), (AGAIN,) * 4).size == 1 + 10 + 50
    leaving = LayerPolicy("offload")
    found = compose({leaving: OFFLOAD, KEPT: KEEP}, (0, 0, 0, 1), (leaving, leaving, KEPT, KEPT), KEEP)
    assert found.size == 1 + (10 - 10) + 10 + 10 + 10 + 50


def test_what_is_no_layer_is_of_the_mixed_trace() -> None:
    mixed = [*RECOMPUTE[:4], Stretch("loss", 1, 70, 4), *RECOMPUTE[5:]]
    found = compose({KEPT: KEEP, AGAIN: RECOMPUTE}, (0, 1, 1), (AGAIN, KEPT, KEPT), mixed)
    assert (found.size, found.when) == (1 + 1 + 2 * 10 + 70, "loss")


def test_what_traced_layers_do_in_the_mixed_trace() -> None:
    policies = (AGAIN, AGAIN, KEPT, KEPT, KEPT)
    assert sampled(3, (0, 1, 1, 1, 2), policies) == (AGAIN, KEPT, KEPT)
    assert sampled(5, (0, 1, 2, 3, 4), policies) == policies
    assert sampled(3, (0, 0, 0, 0, 0), policies) == (KEPT,) * 3, "none stands for nothing"


def test_a_layer_that_the_batch_does_not_reach_adds_nothing() -> None:
    """Phi-4's encoders of pictures and sound, in a batch of text."""
    reached = compose({KEPT: KEEP}, (0, 1), (KEPT,) * 2)
    found = compose({KEPT: KEEP}, (0, 1, 2), (KEPT,) * 3)
    assert found == reached._replace(saved=(*reached.saved, 0))
