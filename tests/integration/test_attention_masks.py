"""Masks: what our mask function says is what transformers' own says, in memory that grows with the tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers import masking_utils as masks

import fastpeft
from fastpeft.integrations.attention import attention_forward
from fastpeft.integrations.attention_documents import documents, restarted_documents
from fastpeft.integrations.attention_masks import decoded, is_causal_alone, parts_of
from fastpeft_kernels.attention.masks import dense_mask

BATCH, TOKENS = 2, 9
MAKERS = {
    "causal": masks.create_causal_mask,
    "window": masks.create_sliding_window_causal_mask,
    "chunk": masks.create_chunked_causal_mask,
    "all": masks.create_bidirectional_mask,
    "around": masks.create_bidirectional_sliding_window_mask,
}
PADDING = {
    "none": None,
    "ones": torch.ones(BATCH, TOKENS, dtype=torch.long),
    "left": torch.tensor([[0] * 3 + [1] * 6, [1] * 9]),
    "right": torch.tensor([[1] * 5 + [0] * 4, [1] * 9]),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0, 1, 1]]),
}
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 0, 1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def registered() -> None:
    fastpeft.register_attention()


def config(name: str) -> LlamaConfig:
    made = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, attn_implementation=name)
    made.sliding_window, made.attention_chunk_size = 3, 4
    return made


def both(maker: str, queries: int, **given: Any) -> tuple[Tensor | None, Tensor]:
    """Our mask, and transformers' own without any left out: bool (batch, 1, queries, keys)."""
    embeds = torch.zeros(BATCH, queries, 8)
    given = {"attention_mask": None, "past_key_values": None} | given
    ours = MAKERS[maker](config("fastpeft"), embeds, **given)
    theirs = MAKERS[maker](config("eager"), embeds, **given)
    if theirs is None:
        return ours, torch.ones(BATCH, 1, queries, queries, dtype=torch.bool)
    return ours, theirs == 0


def dense(mask: Tensor | None, queries: int, keys: int, causal: bool) -> Tensor:
    if mask is None or is_causal_alone(mask):
        seen = torch.ones(queries, keys, dtype=torch.bool)
        assert mask is None or (causal and queries == keys)
        return (seen.tril() if causal else seen).expand(BATCH, 1, queries, keys)
    described, bias = decoded(mask, queries, keys)
    assert bias is None
    seen = dense_mask(described, queries, keys, mask.device)
    assert seen is not None
    return seen.expand(BATCH, 1, queries, keys)


def values(mask: Tensor | None) -> int:
    """How many numbers lie in memory."""
    return 0 if mask is None else mask.untyped_storage().nbytes() // mask.element_size()


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("maker", MAKERS)
def test_padding(maker: str, padding: str) -> None:
    ours, theirs = both(maker, TOKENS, attention_mask=PADDING[padding])
    assert torch.equal(dense(ours, TOKENS, TOKENS, maker not in ("all", "around")), theirs)
    assert values(ours) <= BATCH * 3 * 2 * TOKENS
    if padding in ("none", "ones"):
        assert is_causal_alone(ours) == (maker == "causal") and (ours is None) == (maker == "all")


@pytest.mark.parametrize("maker", ["causal", "window", "chunk"])
def test_packed_documents(maker: str) -> None:
    ours, theirs = both(maker, TOKENS, position_ids=PACKED)
    assert ours is not None and ours.dtype == torch.int32
    assert torch.equal(dense(ours, TOKENS, TOKENS, True), theirs)


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("seen", [0, 2, 5, 8])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("maker", ["causal", "window", "chunk"])
def test_after_a_cache(maker: str, kind: type[Any], seen: int, padding: str) -> None:
    """In chunks: more keys than queries; a static cache's are more than were written."""
    queries = TOKENS - seen
    model = config("eager")
    if maker == "causal":
        model.sliding_window = model.attention_chunk_size = None
    elif maker == "chunk":
        model.sliding_window = None
    cache = kind(config=model) if kind is DynamicCache else kind(config=model, max_cache_len=12)
    if seen:
        cache.update(torch.zeros(BATCH, 2, seen, 4), torch.zeros(BATCH, 2, seen, 4), 0)
    ours, theirs = both(maker, queries, attention_mask=PADDING[padding], past_key_values=cache)
    keys = theirs.shape[-1]
    assert ours is not None or queries in (1, keys)
    assert torch.equal(dense(ours, queries, keys, queries > 1), theirs)
    assert queries == 1 or values(ours) <= BATCH * 3 * (queries + keys)


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("maker", MAKERS)
def test_the_last_queries_of_a_mask(maker: str, padding: str, kept: int) -> None:
    """Gemma 4 cuts masks when it generates: its last layers compute the queries whose logits are wanted."""
    with torch.no_grad():
        ours, theirs = both(maker, TOKENS, attention_mask=PADDING[padding])
    query, key, value = (torch.randn(BATCH, 2, tokens, 8) for tokens in (kept, TOKENS, TOKENS))
    module = SimpleNamespace(is_causal=maker not in ("all", "around"), training=False)
    cut = None if ours is None else ours[:, :, -kept:]
    out, _ = attention_forward(module, query, key, value, cut)
    seen = theirs[:, :, -kept:]
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
    some = seen.any(-1)[:, 0]  # padding that sees nothing gives zeros
    torch.testing.assert_close(out[some], expected[some])


def test_cross_attention() -> None:
    encoder = torch.zeros(BATCH, 4, 8)
    padding = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ours, theirs = both("all", TOKENS, encoder_hidden_states=encoder, attention_mask=padding)
    assert torch.equal(dense(ours, TOKENS, 4, False), theirs) and values(ours) == BATCH * 4


def test_what_is_unknown_becomes_the_mask_of_transformers() -> None:
    """Among them images that see each other, whose function is an `or`, and what a caller wants to add to."""
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]] * BATCH)
    for given in (
        {"block_sequence_ids": blocks},
        {"or_mask_function": lambda b, h, q, k: k < 2},
        {"and_mask_function": lambda b, h, q, k: k > 0},
        {"allow_is_causal_skip": False},
    ):
        ours, theirs = both("causal", TOKENS, attention_mask=PADDING["left"], **given)
        assert ours is not None and ours.dtype == torch.bool and torch.equal(ours, theirs)
    assert parts_of(lambda b, h, q, k: k <= q) is None and parts_of(len) is None


def test_a_prepared_mask_goes_through_again() -> None:
    ours, _ = both("window", TOKENS, attention_mask=PADDING["left"])
    again, _ = both("causal", TOKENS, attention_mask=ours)
    assert again is ours


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 9, 9, dtype=torch.bool), r"torch.bool of shape \(2, 9, 9\)"),
        (torch.ones(2, 1, 9, 9, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, 1, 9, 8, dtype=torch.bool), r"broadcasts to \(batch, heads, 9, 9\)"),
        (torch.ones(2, 1, 17, 2, dtype=torch.int32), "what fastpeft's mask function made"),
        (torch.ones(2, 9), "torch.float32"),
    ],
)
def test_a_mask_that_says_nothing_is_an_error(mask: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoded(mask, 9, 9)


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rows(mask: Any) -> tuple[list[list[int]], list[list[int]]]:
    return mask.start.tolist(), mask.stop.tolist()


class TestDocuments:
    def test_ends_of_one_row(self) -> None:
        given = {"cu_seq_lens_q": ends(0, 4, 9), "cu_seq_lens_k": ends(0, 4, 9)}
        assert rows(documents(9, 9, 1, False, given)) == ([[0] * 4 + [4] * 5], [[4] * 4 + [9] * 5])
        start, stop = rows(documents(9, 9, 1, True, {"cu_seq_lens_q": ends(0, 4, 9)}))
        assert start == [[0] * 4 + [4] * 5] and stop == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]

    def test_ends_of_several_rows(self) -> None:
        given = {"cu_seq_lens_q": ends(0, 2, 4, 7, 8)}
        assert rows(documents(4, 4, 2, False, given)) == ([[0, 0, 2, 2], [0, 0, 0, 3]], [[2, 2, 4, 4], [3, 3, 3, 4]])

    def test_more_keys_than_queries_stand_at_the_end(self) -> None:
        given = {"cu_seq_lens_q": ends(0, 1, 3), "cu_seq_lens_k": ends(0, 3, 7)}
        assert rows(documents(3, 7, 1, True, given)) == ([[0, 3, 3]], [[3, 6, 7]])

    def test_numbers_of_documents(self) -> None:
        given = {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}
        assert rows(documents(5, 5, 1, False, given)) == ([[0, 0, 2, 2, 2]], [[2, 2, 5, 5, 5]])

    def test_positions_that_go_back(self) -> None:
        start, stop = rows(restarted_documents(PACKED, TOKENS))
        assert start[1] == [0, 0, 2, 3, 3, 3, 3, 3, 3] and stop[0] == [1, 2, 3, 4, 5, 6, 7, 8, 9]

    def test_positions_that_do_not(self) -> None:
        """A jump is no document: a user may place tokens anywhere."""
        for positions in (torch.arange(TOKENS)[None], torch.tensor([[0, 1, 2, 7, 8, 9, 20, 21, 22]])):
            assert restarted_documents(positions, TOKENS) is None
        assert restarted_documents(None, TOKENS) is None and restarted_documents(PACKED[None], TOKENS) is None

    def test_positions_that_were_changed_in_place(self) -> None:
        positions = torch.arange(TOKENS)[None].clone()
        assert restarted_documents(positions, TOKENS) is None
        positions.copy_(PACKED[:1])
        assert restarted_documents(positions, TOKENS) is not None
        with torch.inference_mode():
            assert restarted_documents(PACKED.clone(), TOKENS) is not None
