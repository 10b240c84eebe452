"""Families whose attention asks for more than transformers' interface says: sparse keys, masks that are cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import fastpeft
from fastpeft.integrations import attention_masks
from fastpeft.integrations.attention import attention_forward
from tests.integration.models import VOCABULARY, make_base
from tests.integration.steps import assert_step_close, step, truth

_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_INDEXER = {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 16}
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_SIZES |= {"num_hidden_layers": 2, "pad_token_id": 0}


def sparse() -> Any:
    """DeepSeek V3.2's: each query sees three keys, which an indexer chooses."""
    torch.manual_seed(0)
    sizes = {**_SIZES, **_LATENT, **_INDEXER, "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 2}
    return hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(**sizes)).train()


def sharing() -> Any:
    """Gemma 4's: the last layers have the keys of earlier ones, and compute only queries whose logits are wanted."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": KINDS * 2, "sliding_window": 3}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    words = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    model = hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**{**_SIZES, **layers, **heads, **words}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


KINDS = ["sliding_attention", "full_attention"]


def batch(padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_sparse_attention_stays_as_it_is() -> None:
    model = sparse()
    given = {**batch(), "labels": batch()["input_ids"]}
    plain, exact = step(copy.deepcopy(model), given), truth(model, given)
    ours = step(fastpeft.accelerate(model), given)
    rows = [row for row in fastpeft.report(model).rows if row.kind == "attention"]
    assert len(rows) == 2 and all("sparse attention" in row.note and not row.accelerated for row in rows)
    assert_step_close(ours, plain, exact)


def test_sparse_attention_by_name_is_refused() -> None:
    model = sparse()
    fastpeft.register_attention()
    model.set_attn_implementation("fastpeft")
    with pytest.raises(ValueError, match="attn_implementation: expected 'eager' or 'sdpa' for sparse attention"):
        model(**batch())


def weighing() -> Any:
    """Doge's: each key has a weight that is made of its value and added to the mask."""
    torch.manual_seed(0)
    return hf.DogeForCausalLM(hf.DogeConfig(**_SIZES, num_key_value_heads=2, keep_window_size=4)).train()


def test_attention_that_makes_a_mask_of_the_model_s_stays_as_it_is() -> None:
    """Documents hide keys, which the mask function tells in intervals: nothing that such code could add to."""
    model = weighing()
    model.config.use_cache = False  # with a cache transformers looks for no documents
    ids = batch()["input_ids"]
    documents = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, -1)
    given = {"input_ids": ids, "position_ids": documents, "labels": ids}
    plain, exact = step(copy.deepcopy(model), given), truth(model, given)
    ours = step(fastpeft.accelerate(model), given)
    rows = [row for row in fastpeft.report(model).rows if row.kind == "attention"]
    assert len(rows) == 2 and all("makes a mask of the model's" in row.note and not row.accelerated for row in rows)
    assert_step_close(ours, plain, exact)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("wanted", [1, 3])
def test_layers_that_compute_the_last_queries_alone(wanted: int, padding: int) -> None:
    model = sharing()
    given = batch(padding)
    with torch.no_grad():
        plain = model(**given, logits_to_keep=wanted).logits
        fastpeft.accelerate(model)
        ours = model(**given, logits_to_keep=wanted).logits
    torch.testing.assert_close(ours, plain)


def test_holes_in_padding_before_layers_that_compute_the_last_query_alone() -> None:
    model = sharing()
    given = batch(4)
    given["attention_mask"][0, 5:7] = 0
    plain = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert torch.equal(fastpeft.accelerate(model).generate(**given, max_new_tokens=3, do_sample=False), plain)


def test_holes_among_many_tokens_take_no_mask_of_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where such a mask is cut it is an error, no other numbers."""
    monkeypatch.setattr(attention_masks, "_FEW_SEEN", 2 * 16 * 16 - 1)
    attended = torch.ones(2, 16, dtype=torch.bool)
    attended[0, 5:7] = False
    with torch.no_grad():
        mask = attention_masks.interval_mask(2, 16, 16, attention_mask=attended)
    assert mask is not None and mask.shape == (2, 1, 32, 3)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        attention_masks.decoded(mask[:, :, -1:], 1, 16)


@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 4, 2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_values_with_other_heads_than_keys(tokens: int, heads: tuple[int, ...]) -> None:
    model = make_base("llama")
    module = next(each for each in model.modules() if type(each).__name__ == "LlamaAttention")
    query, key, value = (torch.randn(2, each, tokens, 8) for each in heads)
    out, _ = attention_forward(module, query, key, value, None)
    key, value = (each.repeat_interleave(4 // each.shape[1], dim=1) for each in (key, value))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
