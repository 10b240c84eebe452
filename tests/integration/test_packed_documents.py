"""Packed documents give what they give one by one, token by token, whoever tells where they end."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening

import fastpeft
from fastpeft.integrations import attention_documents
from fastpeft_kernels.attention.masks import Mask
from tests.integration.attention_models import inputs, make
from tests.integration.models import VOCABULARY, make_base
from tests.integration.steps import assert_each_close
from tests.integration.test_attention_models import accelerated, eager, wide_softmax

FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3")
TOLD = ("position_ids", "cu_seq_lens", "seq_idx", "all", "mask")
OFTEN = (("llama", "position_ids", True), ("gpt_oss", "cu_seq_lens", True), ("llama", "mask", False))
CELLS = [
    pytest.param(*cell, marks=[] if cell in OFTEN else pytest.mark.full)
    for cell in product(FAMILIES, TOLD, (True, False))
]
LENGTHS = (7, 1, 4, 9)
"""Some longer than the windows of the models."""
DOCUMENTS = [
    torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in LENGTHS
]


def flattened(told: str) -> dict[str, Any]:
    """One row, as collators give it: with positions that go back to 0 ("position_ids"), beside a mask of ones ("mask"),
    with ends or numbers of documents and positions that run on, which tell nothing, or with all of these ("all").
    """
    chosen = {"return_flash_attn_kwargs": told in ("cu_seq_lens", "all"), "return_seq_idx": told in ("seq_idx", "all")}
    given = dict(DataCollatorWithFlattening(**chosen)([{"input_ids": document} for document in DOCUMENTS]))
    del given["labels"]
    positions = given.pop("position_ids").long()
    if told in ("position_ids", "mask", "all"):
        given["position_ids"] = positions
    if told == "mask":
        given["attention_mask"] = torch.ones_like(positions)
    return given


class Tokens(NamedTuple):
    """(tokens, words) and (tokens, hidden), of all documents one after the other."""

    logits: Tensor
    gradients: Tensor


def run(model: Any, input_ids: Tensor, weights: Tensor, **given: Any) -> Tokens:
    """The logits, and the embeddings' gradients of their sum with `weights`."""
    embedded = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **given).logits[0]
    (gradients,) = torch.autograd.grad(logits, embedded, weights.to(logits.dtype))
    return Tokens(logits.detach(), gradients[0])


def apart(model: Any, weights: Tensor) -> Tokens:
    """Each document in a batch of its own."""
    parts = [
        run(model, torch.tensor([document]), some)
        for document, some in zip(DOCUMENTS, weights.split(LENGTHS), strict=True)
    ]
    return Tokens(*map(torch.cat, zip(*parts, strict=True)))


def check(name: str, told: str, use_cache: bool) -> None:
    model, weights = make(name), torch.randn(sum(LENGTHS), VOCABULARY, generator=torch.Generator().manual_seed(2))
    plain = eager(model)
    with wide_softmax():
        exact = apart(copy.deepcopy(plain).double(), weights)
    found = run(accelerated(model), weights=weights, use_cache=use_cache, **flattened(told))
    for ours, theirs, true in zip(found, apart(plain, weights), exact, strict=True):
        assert_each_close(ours, theirs, true)


@pytest.mark.parametrize(("name", "told", "use_cache"), CELLS)
def test_each_token_has_the_logits_and_gradients_of_its_document_alone(name: str, told: str, use_cache: bool) -> None:
    check(name, told, use_cache)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llama", "position_ids"),
        *(
            pytest.param(*cell, marks=pytest.mark.full)
            for cell in product(FAMILIES, TOLD[:3])
            if cell != ("llama", "position_ids")
        ),
    ],
)
def test_a_planted_leak_is_caught(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query sees one key before its document, where there is one."""
    for derive in ("packed", "packed_by_index"):
        right = getattr(attention_documents, derive)

        def leaking(*args: Any, right: Any = right, **kwargs: Any) -> Mask:
            mask = right(*args, **kwargs)
            return replace(mask, start=(mask.start - 1).clamp(min=0))

        monkeypatch.setattr(attention_documents, derive, leaking)
    with pytest.raises(AssertionError, match="row 7: "):
        check(name, told, use_cache=True)


class Derivations(TorchDispatchMode):
    """Counts what documents are derived with, forward and backward, and waits for whether there are any."""

    looked_for = ("searchsorted", "cummax", "cummin", "cumsum", "maximum", "minimum", "diff", "is_nonzero", "any")

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.looked_for and all(not t.is_floating_point() for t in args if isinstance(t, Tensor)):
            self.made[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("told", TOLD[:3])
def test_documents_are_derived_once_for_all_layers(told: str) -> None:
    """As many waits and launches of it in a step of four layers, each computed again, as in one of two."""
    found = []
    for depth in (2, 4):
        given = flattened(told)
        model = accelerated(make_base("llama", num_hidden_layers=depth).train())
        fastpeft.accelerate(model, memory=fastpeft.LayerPolicy("recompute"))
        with Derivations() as counted:
            model(**given, use_cache=True).logits.sum().backward()
        found.append(counted.made)
    assert found[0] == found[1] and sum(found[0].values()) > 0


def test_transformers_own_leaks_with_a_cache() -> None:
    """Which is why `use_cache=True` is tested above."""
    plain, weights = eager(make("llama")), torch.randn(sum(LENGTHS), VOCABULARY)
    found, wanted = run(plain, weights=weights, use_cache=True, **flattened("position_ids")), apart(plain, weights)
    assert (found.logits - wanted.logits)[LENGTHS[0] :].norm() > 0.1 * wanted.logits.norm()


def test_a_position_0_of_padding_begins_no_document() -> None:
    """Also where it lies between tokens that see each other."""
    model = make("llama").eval()
    ids, mask = inputs(model)["input_ids"], torch.ones(2, 11, dtype=torch.long)
    mask[0, 4:6] = mask[1, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1) * mask}
    wanted = eager(model)(**given).logits[mask.bool()]
    torch.testing.assert_close(accelerated(model)(**given).logits[mask.bool()], wanted)
