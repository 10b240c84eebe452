"""Traced layers put together to a whole model, by arithmetic."""

from __future__ import annotations

from fastpeft.memory.policy import LayerPolicy
from fastpeft.memory.trace.composing import compose
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


def test_what_ends_a_layer_before_the_next_one_is_that_layers() -> None:
    """transformers of 5.17 and around checkpoint outside the hooks: an input leaves the device after its layer."""
    offload = [
        Stretch("begin", -1, 5, 1),
        Stretch("forward", 0, 12, 10),
        Stretch("loss", 0, 0, -10),
        Stretch("forward", 1, 12, 10),
        Stretch("loss", 1, 50, -6),
        Stretch("turn", -1, 6, -2),
        Stretch("backward", 1, 17, 0),
        Stretch("backward", 0, 17, 0),
    ]
    assert compose({AGAIN: offload}, (0, 0, 0, 1), (AGAIN,) * 4).size == 1 + 10 + 50
