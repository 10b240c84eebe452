"""PEFT's trainable tokens: PEFT's numbers in every state of the layer, and no copy of an embedding or a head."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fastpeft
from fastpeft.layers.lazy_logits import LazyLogits, plain
from fastpeft.layers.tokens import FastTokens
from tests.budget import assert_within_budget
from tests.integration.models import VOCABULARY, batch, make, make_base, with_lora
from tests.integration.reports import notes
from tests.integration.steps import assert_close, assert_step_close, step, truth
from tests.integration.test_loss import assert_served, loss_row, never_made
from tests.kernels.allocations import largest
from tests.processes import together

full = pytest.mark.full
IDS = torch.tensor([[3, 0, 5, 3], [1, 1, 0, 6]])


class Words(nn.Module):
    """With a head, tied to the embedding or not."""

    is_gradient_checkpointing = False

    def __init__(self, embedding: nn.Embedding, tied: bool = False) -> None:
        super().__init__()
        self.words, self.middle = embedding, nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.config = {"model_type": "words", "tie_word_embeddings": tied}
        if tied:
            self.head.weight = embedding.weight
            self._tied_weights_keys = {"head.weight": "words.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.words(ids)))


EMBEDDINGS: dict[str, Callable[[], nn.Embedding]] = {
    "plain": lambda: nn.Embedding(7, 8),
    "padding": lambda: nn.Embedding(7, 8, padding_idx=0),
    "gemma3": lambda: Gemma3TextScaledWordEmbedding(7, 8, 0, embed_scale=8**0.5),
    "bf16": lambda: nn.Embedding(7, 8, dtype=torch.bfloat16),
}
TOGETHER: dict[str, Any] = {
    "embedding": [0, 3],
    "both": {"words": [0, 3], "head": [6, 3]},
}


def moved(model: nn.Module) -> None:
    """As after some training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))


def pair(embedding: nn.Embedding, tied: bool = False, indices: Any = (0, 3)) -> tuple[PeftModel, PeftModel]:
    """(accelerated, PEFT's), with LoRA between."""
    tokens = indices if isinstance(indices, dict) else list(indices)
    config = LoraConfig(target_modules=["middle"], r=2, init_lora_weights=False, trainable_token_indices=tokens)
    peft = get_peft_model(Words(embedding, tied).to(embedding.weight.dtype), config)
    moved(peft)
    return fastpeft.accelerate(copy.deepcopy(peft)), peft


def add_another(ours: PeftModel, peft: PeftModel) -> None:
    """Adapter "b", of other tokens."""
    config = LoraConfig(target_modules=["middle"], r=3, init_lora_weights=False, trainable_token_indices=[1, 6, 2])
    for model in (ours, peft):
        model.add_adapter("b", config)
    moved(peft)
    ours.load_state_dict(peft.state_dict())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    y = model(IDS)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def values(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": model(IDS, **options)}


def check(ours: nn.Module, peft: nn.Module, run: Callable[[nn.Module], dict[str, Tensor]] = gradients) -> None:
    """What `run` gives of ours is PEFT's, within the budget of every op."""
    found, expected, exact = run(ours), run(peft), run(copy.deepcopy(peft).double())
    assert found.keys() == expected.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert_within_budget(value, expected[name], exact[name], name=name)


def layers(model: nn.Module) -> list[FastTokens]:
    return [module for module in model.modules() if isinstance(module, FastTokens)]


def outcomes(model: nn.Module) -> set[str]:
    """Of those that were called; T5's shared embedding is so under other names alone."""
    return {outcome for layer in layers(model) for outcome in layer.__dict__.get("fastpeft_calls", {})}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_values_and_gradients(kind: str) -> None:
    ours, peft = pair(EMBEDDINGS[kind]())
    check(ours, peft)
    assert outcomes(ours) == {"fused"} and not notes(ours)


@pytest.mark.parametrize("indices", TOGETHER.values(), ids=TOGETHER)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_heads(tied: bool, indices: Any) -> None:
    ours, peft = pair(nn.Embedding(7, 8), tied, indices)
    check(ours, peft)
    assert len(layers(ours)) == 2 - (not tied and isinstance(indices, list)) and outcomes(ours) == {"fused"}


def test_without_lora() -> None:
    peft = get_peft_model(Words(nn.Embedding(7, 8), True), tokens_alone([0, 3]))
    moved(peft)
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    check(ours, peft)
    assert len(layers(ours)) == 2 and outcomes(ours) == {"fused"}


def tokens_alone(indices: list[int]) -> TrainableTokensConfig:
    return TrainableTokensConfig(target_modules=["words"], token_indices=indices)


def test_two_adapters_at_once() -> None:
    """PEFT has more than one active there, without LoRA, alone, and over no tied head."""
    peft = get_peft_model(Words(nn.Embedding(7, 8)), tokens_alone([0, 3]))
    peft.add_adapter("b", tokens_alone([5]))
    moved(peft)
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    for active in (["default"], ["b"], ["b", "default"]):
        for model in (ours, peft):
            model.base_model.set_adapter(active)
        check(ours, peft)
    assert outcomes(ours) == {"fused"}


def test_tokens_of_two_active_adapters_that_overlap_are_peft_s_error() -> None:
    peft = get_peft_model(Words(nn.Embedding(7, 8)), tokens_alone([0, 3]))
    peft.add_adapter("b", tokens_alone([3]))
    peft.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="already defined"):
        fastpeft.accelerate(peft)(IDS)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_switched_disabled_merged_and_deleted(tied: bool) -> None:
    ours, peft = pair(nn.Embedding(7, 8), tied)
    add_another(ours, peft)
    for active in ("b", "default"):
        for model in (ours, peft):
            model.set_adapter(active)
        check(ours, peft)
    with ours.disable_adapter(), peft.disable_adapter():
        check(ours, peft, values)
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (ours, peft):
            getattr(model, change)()
        check(ours, peft, values)
    check(ours, peft)
    for model in (ours, peft):
        model.delete_adapter("default")
        model.set_adapter("b")
    check(ours, peft)
    merged = [model.merge_and_unload() for model in (ours, peft)]
    check(*merged, values)
    assert not layers(merged[0])


def test_a_merge_before_backward_is_noticed() -> None:
    ours, _ = pair(nn.Embedding(7, 8), True)
    y = ours(IDS).sum()
    ours.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_adapter_added_before_backward_changes_nothing() -> None:
    """It copies rows of the base, which is not written to."""
    peft = get_peft_model(Words(nn.Embedding(7, 8)), tokens_alone([0, 3]))
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    results = [model(IDS).square().sum() for model in (ours, peft)]
    for model in (ours, peft):
        model.add_adapter("b", tokens_alone([5]))
    parameters = [[p for name, p in model.named_parameters() if "delta.default" in name] for model in (ours, peft)]
    found = [torch.autograd.grad(y, of)[0] for y, of in zip(results, parameters, strict=True)]
    torch.testing.assert_close(*found)


def test_rows_with_adapters_of_their_own() -> None:
    ours, peft = pair(nn.Embedding(7, 8), True)
    add_another(ours, peft)
    for names in (["b", "default"], ["default", "__base__"], ["b", "b"]):
        check(ours.eval(), peft.eval(), partial(values, adapter_names=names))
    assert outcomes(ours) == {"fused"}


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_what_cannot_be_is_peft_s_and_named(options: dict[str, Any]) -> None:
    ours, peft = pair(nn.Embedding(7, 8, **options))
    check(ours, peft, values if "sparse" in options else gradients)  # PEFT's has no gradients there
    (row,) = [row for row in fastpeft.report(ours).rows if row.path.endswith("token_adapter")]
    assert "max_norm, scale_grad_by_freq" in row.note


def test_a_trained_base_is_peft_s() -> None:
    ours, peft = pair(nn.Embedding(7, 8))
    for model in (ours, peft):
        model.base_model.model.words.token_adapter.base_layer.weight.requires_grad_(True)
    check(ours, peft)
    assert outcomes(ours) == {"the base weight is trained"}


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_pickled_copied_restored_and_saved(tied: bool, tmp_path: Path) -> None:
    ours, peft = pair(nn.Embedding(7, 8), tied)
    expected, by_peft = gradients(ours), gradients(peft)
    for model in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert len(layers(model)) == 1 + tied
        torch.testing.assert_close(gradients(model), expected)
    assert list(ours.state_dict()) == list(peft.state_dict())
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(peft).unload(), tmp_path, is_trainable=True)
    torch.testing.assert_close(gradients(fastpeft.accelerate(again)), expected)
    classes = [type(module) for module in peft.modules()]
    assert [type(module) for module in fastpeft.restore(ours).modules()] == classes
    assert not any(name.startswith("fastpeft") for module in ours.modules() for name in module.__dict__)
    torch.testing.assert_close(gradients(ours), by_peft)


class TestModels:
    """Whole language models, whose loss is computed without logits."""

    @pytest.mark.parametrize("indices", [[3, 7], {"embed_tokens": [3, 7], "lm_head": [7, 40]}], ids=["tied", "apart"])
    def test_loss_and_gradients(self, indices: Any) -> None:
        assert_served(*given(indices))

    @pytest.mark.parametrize(
        ("name", "embedding", "target"),
        [
            pytest.param("t5", "shared", "q", id="t5"),
            pytest.param("bart", "shared", "q_proj", marks=full, id="bart"),
            pytest.param("gemma2", "embed_tokens", "q_proj", marks=full, id="gemma2"),
            pytest.param("gpt2", "wte", "c_attn", marks=full, id="gpt2"),
        ],
    )
    def test_each_architecture(self, name: str, embedding: str, target: str) -> None:
        """Tied heads, and embeddings that an encoder and a decoder share."""
        model = make(name, target_modules=[target], trainable_token_indices={embedding: [5, 7]})
        moved(model)
        inputs = batch(model)
        inputs["input_ids"][:, 1:3] = torch.tensor([5, 7])
        assert_served(model, inputs)
        assert len(layers(model)) == (4 if embedding == "shared" else 2) and outcomes(model) == {"fused"}

    def test_neither_logits_nor_a_matrix(self) -> None:
        """Of more words than are multiplied at a time: the chunk that holds the tokens is copied."""
        model = with_lora(make_base(tie_word_embeddings=True, vocab_size=60000), trainable_token_indices=[3, 7]).train()
        inputs = batch(model)
        logits, matrix = 4 * inputs["input_ids"].numel() * 60000, 4 * 64 * 60000
        assert largest(lambda: model(**inputs).loss.backward()) >= matrix
        fastpeft.accelerate(model)(**inputs)
        assert largest(lambda: model(**inputs).loss.backward()) < logits < matrix

    @pytest.mark.parametrize("checkpointing", [pytest.param(True, marks=full), False], ids=["reentrant", "not"])
    def test_activation_checkpointing(self, checkpointing: bool) -> None:
        model, inputs = given([3, 7])
        exact, peft = truth(model, inputs), step(model, inputs)
        fastpeft.accelerate(model).enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        assert_step_close(step(model, inputs), peft, exact)

    def test_autocast(self) -> None:
        model, inputs = given([3, 7])
        exact = truth(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            peft = step(model, inputs)
            fastpeft.accelerate(model)
            with never_made():
                ours = step(model, inputs)
        assert_step_close(ours, peft, exact)

    def test_adapters_in_fp32_on_a_base_in_bf16(self) -> None:
        model, inputs = given([3, 7], dtype=torch.bfloat16)
        exact, peft = truth(model, inputs), step(model, inputs)
        (delta,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
        assert delta.dtype == torch.float32
        assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("replaced", [float("nan"), 1e4])
    def test_the_base_rows_of_trained_tokens_are_never_read(self, replaced: float, dtype: torch.dtype) -> None:
        model, inputs = given([3, 7], dtype=dtype)
        exact, peft = truth(model, inputs), step(model, inputs)
        with torch.no_grad():
            model.get_input_embeddings().token_adapter.base_layer.weight[[3, 7]] = replaced
        with never_made():
            ours = step(fastpeft.accelerate(model), inputs)
        assert_step_close(ours, peft, exact)

    def test_logits_for_whoever_reads_them(self) -> None:
        model, inputs = given([3, 7])
        models = fastpeft.accelerate(copy.deepcopy(model)), model, copy.deepcopy(model).double()
        dy = torch.randn(*inputs["input_ids"].shape, VOCABULARY)
        logits = [each(**inputs).logits for each in models]
        assert type(logits[0]) is LazyLogits
        assert_close(*[plain(z) for z in logits])
        deltas = [p for each in models for name, p in each.named_parameters() if "trainable_tokens_delta" in name]
        assert_close(*[torch.autograd.grad(z, p, dy.to(z.dtype))[0] for z, p in zip(logits, deltas, strict=True)])

    def test_a_disabled_adapter(self) -> None:
        model, inputs = given([3, 7])
        with model.disable_adapter():
            expected = model(**inputs).loss
            fastpeft.accelerate(model)
            with never_made():
                torch.testing.assert_close(model(**inputs).loss, expected)

    def test_more_tokens_than_pay_make_logits(self) -> None:
        model, inputs = given(list(range(3, 40)))
        exact, peft = truth(model, inputs), step(model, inputs)
        assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)
        assert loss_row(model).note == "1 of 1 calls with logits: 37 trained tokens, more than half of 64 features"
        assert outcomes(model) == {"fused"}

    @full
    def test_compiled(self) -> None:
        model, inputs = given([3, 7])
        expected = step(model, inputs)
        found = step(torch.compile(fastpeft.accelerate(model), backend="aot_eager"), inputs)
        torch.testing.assert_close(found.loss, expected.loss)
        wanted = {name: g for name, g in expected.gradients.items() if "trainable" in name}
        assert wanted
        torch.testing.assert_close({name: found.gradients[f"_orig_mod.{name}"] for name in wanted}, wanted)

    def test_verified(self) -> None:
        model, inputs = given([3, 7])
        proof = fastpeft.verify(fastpeft.accelerate(model), inputs)
        checked = {check.path for check in proof.checks if check.path.endswith("token_adapter")}
        assert proof.passed and len(checked) == 2 and not proof.unserved

    @full
    def test_data_parallel(self, tmp_path: Path) -> None:
        model, inputs = given([3, 7])
        results = {}
        for name, each in (("peft", model), ("ours", fastpeft.accelerate(copy.deepcopy(model)))):
            (folder := tmp_path / name).mkdir()  # where the processes of one group find each other
            results[name] = together(2, partial(_by_ddp, each, inputs), folder)
        expected, found = results["peft"], results["ours"]
        torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)
        torch.testing.assert_close(found, expected)


def _by_ddp(model: nn.Module, inputs: dict[str, Tensor], rank: int) -> Tensor:
    """The gradient of the trained rows, of two processes that have a row each."""
    mine = {name: value[rank : rank + 1] for name, value in inputs.items()}
    parallel = nn.parallel.DistributedDataParallel(model)  # whose going would end the exchange
    parallel(**mine).loss.backward()
    (gradient,) = [p.grad for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert gradient is not None
    return gradient


def given(indices: Any, dtype: torch.dtype = torch.float32) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model, tied where the embedding's tokens alone are told, and a batch that holds some of them."""
    tied = isinstance(indices, list)
    if tied:
        model = with_lora(make_base(tie_word_embeddings=True, dtype=dtype), trainable_token_indices=indices).train()
    else:
        model = make(trainable_token_indices=indices)
    moved(model)
    inputs = batch(model)
    inputs["input_ids"][:, 1:3] = torch.tensor([3, 7])
    inputs["labels"][:, 2:4] = torch.tensor([7, 40 % VOCABULARY])
    return model, inputs
