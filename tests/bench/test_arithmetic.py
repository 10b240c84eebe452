"""Bytes and operations of a layer on paper, and the page that shows them."""

import pytest

from fastpeft.bench.arithmetic import LLAMA_8B, WAYS, Reader, layer_table
from tests.docs.pages import DOCS


def test_the_page_shows_the_table():
    assert layer_table() in (DOCS / "concepts" / "fused-lora.md").read_text(encoding="utf-8")


def test_llama_has_its_weights_and_operations():
    assert sum(reader.inputs * reader.total for reader in LLAMA_8B) == 218_103_808


def test_a_projection_by_peft():
    """10 tokens of 3 features to 5: x 30 elements, y 50."""
    forward, backward = WAYS["PEFT"](Reader(3, (5,)), 10)
    assert (forward, backward) == (30 + 6 * 50, 4 * 50 + 5 * 30)


@pytest.mark.parametrize("reader", LLAMA_8B)
def test_each_way_moves_less_than_the_one_before_it(reader):
    moved = [sum(way(reader, 8192)) for way in WAYS.values()]
    assert moved == sorted(moved, reverse=True)
