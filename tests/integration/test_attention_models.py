"""Whole models whose attention is ours: loss and gradients of eager attention, whatever the mask; memory; and back."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MllamaForCausalLM,
    StaticCache,
)
from transformers.models.mllama import MllamaTextConfig

import fastpeft
from fastpeft.layers.relative_bias import MIXTURES
from tests.integration.attention_models import NAMES, inputs, make
from tests.integration.models import add_adapter, checkpointed, with_lora
from tests.integration.reports import shape_of
from tests.integration.steps import assert_step_close, step, truth

OFTEN = ("llama", "gemma2", "gpt_oss", "bert", "t5", "umt5", "pegasus_x")
MODELS = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in NAMES]


def eager(model: Any) -> Any:
    """A copy with the attention that every other is measured by."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


def accelerated(model: Any) -> Any:
    """With our attention, and nothing else of ours."""
    return fastpeft.accelerate(model, lora=False, mlp=False)


@contextmanager
def wide_softmax() -> Iterator[None]:
    """Within it eager attention's softmax is in the model's dtype: elsewhere in fp32, whatever that is."""
    softmax = nn.functional.softmax
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
        yield


def exact(plain: Any, given: dict[str, Any]) -> Any:
    """`truth` of eager attention."""
    with wide_softmax():
        return truth(plain, given)


def check(model: Any, given: dict[str, Any]) -> None:
    """One step of ours against eager's."""
    plain = eager(model)
    assert_step_close(step(accelerated(model), given), step(plain, given), exact(plain, given))


def rows(model: nn.Module) -> list[Any]:
    return [row for row in fastpeft.report(model).rows if row.kind == "attention"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["none", "left", pytest.param("right", marks=pytest.mark.full)])
def test_loss_and_gradients_are_those_of_eager(name: str, padding: str) -> None:
    model = make(name)
    if name == "umt5" and not model.decoder.block[0].layer[0].SelfAttention.is_causal:
        pytest.skip("UMT5 of this transformers sees later tokens where nothing is padded")
    check(model, inputs(model, padding))
    assert rows(model) and all(row.accelerated and not row.note for row in rows(model))


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["t5", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama", "umt5"))])
def test_with_activation_checkpointing(name: str, use_reentrant: bool) -> None:
    model = make(name)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    check(model, inputs(model))


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.full)])
def test_with_lora_accelerated_too(name: str) -> None:
    model = with_lora(make(name), None, target_modules="all-linear" if name == "llama" else ["q", "v", "wi_0"])
    given, plain = inputs(model.get_base_model()), copy.deepcopy(model)
    plain.get_base_model().set_attn_implementation("eager")
    oracle, reference = exact(plain, given), step(plain, given)
    fastpeft.accelerate(model)
    for _ in range(2):
        assert_step_close(step(model, given), reference, oracle)
    assert len(rows(model)) == (2 if name == "llama" else 6)


def longest(model: Any, given: dict[str, Any]) -> int:
    """The most elements that any tensor has which is made in a forward and backward."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, Tensor):
                    self.most = max(self.most, each.untyped_storage().nbytes() // each.element_size())
            return out

    with Largest() as seen:
        model(**given).loss.backward()
    return seen.most


@pytest.mark.parametrize("name", ["t5", "umt5", pytest.param("llama", marks=pytest.mark.full)])
def test_no_tensor_of_queries_times_keys_of_t5_s_bias_or_of_a_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the op, which is replaced by one that makes nothing: masks, T5's bias and its zeros."""

    def nothing(q: Tensor, k: Tensor, v: Tensor, *, relative: Tensor | None = None, **_: Any) -> Tensor:
        extra = 0.0 if relative is None else relative.sum()
        return (q + k.mean() + v.mean() + extra).transpose(1, 2).contiguous().transpose(1, 2)

    model = make(name)
    tokens = 400 if name == "llama" else 512
    given = inputs(model, "left", tokens)
    if name != "llama":
        given["labels"] = given["input_ids"]
    monkeypatch.setattr("fastpeft.integrations.attention.attention", nothing)
    assert longest(accelerated(model), given) < 2 * tokens * 128 + 1


class TestGenerating:
    @pytest.mark.parametrize(
        "name",
        ["llama", "t5", "umt5"]
        + [pytest.param(name, marks=pytest.mark.full) for name in ("mistral", "gemma2", "gpt_oss", "bart", "whisper")],
    )
    def test_the_tokens_of_eager(self, name: str) -> None:
        model = make(name).eval()
        given = {n: v for n, v in inputs(model, "left").items() if n != "labels"}
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
        wanted = eager(model).generate(**given, **options)
        assert torch.equal(accelerated(model).generate(**given, **options), wanted)

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.full) for name in ("llama", "mistral", "gemma3")]
    )
    def test_over_a_static_cache(self, name: str) -> None:
        model = make(name).eval()
        given = {n: v for n, v in inputs(model, "left").items() if n != "labels"}
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
        wanted = eager(model).generate(**given, **options)
        assert torch.equal(accelerated(model).generate(**given, **options), wanted)

    @pytest.mark.parametrize("static", [False, True])
    def test_a_prompt_in_chunks(self, static: bool) -> None:
        """More keys than queries: those that were seen, and those of a static cache that are not written yet."""
        model = make("llama").eval()
        ids, plain = inputs(model)["input_ids"], eager(model)
        wanted = plain(input_ids=ids).logits
        accelerated(model)
        cache = StaticCache(config=model.config, max_cache_len=16) if static else None
        parts = []
        with torch.no_grad():
            for part in ids.split(4, dim=1):
                out = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache, parts = out.past_key_values, [*parts, out.logits]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted)


class TestSwitching:
    def test_restore_leaves_no_trace(self) -> None:
        for name in ("llama", "t5", "umt5"):
            model = make(name)
            shape, implementation = shape_of(model), model.config._attn_implementation
            given = inputs(model)
            before = step(model, given)
            step(accelerated(model), given)
            assert model.config._attn_implementation == "fastpeft"
            fastpeft.restore(model)
            assert shape_of(model) == shape and model.config._attn_implementation == implementation
            assert step(model, given).equals(before)

    @pytest.mark.parametrize("name", ["t5", pytest.param("umt5", marks=pytest.mark.full)])
    def test_there_and_back_by_hand(self, name: str) -> None:
        """T5's bias is queries x keys again for whoever wants it so."""
        model = accelerated(make(name))
        given = inputs(model)
        plain = eager(fastpeft.restore(copy.deepcopy(model)))
        oracle, reference = exact(plain, given), step(plain, given)
        for there in ("eager", "sdpa", "fastpeft"):
            for part in (model, model.encoder, model.decoder):  # transformers 5.17 does not reach the stacks
                part.set_attn_implementation(there)
            assert_step_close(step(model, given), reference, oracle)
            assert all(row.accelerated == (there == "fastpeft") for row in rows(model))

    def test_what_was_asked_for_by_name_stays(self) -> None:
        model = make("llama")
        model.config._attn_implementation = "flex_attention"
        fastpeft.accelerate(model)
        assert {row.note for row in rows(model)} == {"attn_implementation='flex_attention' was asked for"}
        assert model.config._attn_implementation == "flex_attention"

    def test_switched_off(self) -> None:
        model = accelerated(make("t5"))
        fastpeft.accelerate(model, attention=False)
        assert {row.note for row in rows(model)} == {"attention=False"}
        assert model.config._attn_implementation == "sdpa"
        assert not any(isinstance(module, MIXTURES) for module in model.modules())

    def test_two_models_of_one_process(self) -> None:
        ours, other = make("llama"), make("llama")
        accelerated(ours)
        assert other.config._attn_implementation == "sdpa" and not fastpeft.report(other).accelerated
        given = inputs(ours)
        assert_step_close(step(ours, given), step(other, given), exact(eager(other), given))

    def test_registered_without_accelerate(self) -> None:
        fastpeft.register_attention()
        fastpeft.register_attention()
        model = make("llama")
        given = inputs(model)
        oracle, reference = exact(eager(model), given), step(eager(model), given)
        model.set_attn_implementation("fastpeft")
        assert_step_close(step(model, given), reference, oracle)

    def test_a_class_with_attention_of_its_own(self) -> None:
        sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = FalconForCausalLM(FalconConfig(**sizes))
        fastpeft.accelerate(model)
        assert ["attention of its own" in row.note for row in rows(model)] == [True]

    def test_a_part_with_another_implementation(self) -> None:
        """An encoder and a decoder have configurations of their own."""
        model = make("t5")
        model.encoder.config._attn_implementation = "flex_attention"
        accelerated(model)
        assert model.decoder.config._attn_implementation == "fastpeft"
        assert model.encoder.config._attn_implementation == "flex_attention"
        assert model.config._attn_implementation == "sdpa"


class TestLeaving:
    """Nothing of it follows a model elsewhere, unless it knows the way back."""

    def test_copies_and_pickles(self) -> None:
        model = accelerated(make("t5"))
        given = inputs(model)
        expected = step(model, given)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert step(other, given).equals(expected)
            assert fastpeft.restore(other).config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "fastpeft"

    def test_a_saved_model_says_nothing_of_it(self, tmp_path: Path) -> None:
        model = accelerated(make("llama"))
        model.save_pretrained(tmp_path)
        assert "fastpeft" not in (tmp_path / "config.json").read_text()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config._attn_implementation == "sdpa"


class TestCalls:
    """What a call may ask for besides."""

    @pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("t5", marks=pytest.mark.full)])
    def test_the_weights_are_eager_s(self, name: str) -> None:
        """GPT-2's layers are not told that somebody wants them."""
        model = make(name).eval()
        given = inputs(model, "none")
        plain = eager(model)
        where = "decoder_attentions" if name == "t5" else "attentions"
        wanted = getattr(plain(**given, output_attentions=True), where)
        found = getattr(accelerated(model)(**given, output_attentions=True), where)
        assert wanted and len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert "by the model's own function: output_attentions" in rows(model)[0].note

    @pytest.mark.parametrize("how", ["reentrant", "not reentrant", "recompute", "offload"])
    def test_weights_of_layers_that_are_computed_again(self, how: Any) -> None:
        """In backward no model collects outputs, which is all that GPT-2's layers could tell it by."""
        model = make("gpt2").train()
        given = inputs(model, "none")
        for attention in (layer.attn for layer in model.transformer.h):
            attention.attn_dropout.p = 0.3
        plain, fast = eager(model), accelerated(model)
        if "reentrant" in how:
            plain, fast = (checkpointed(each, how == "reentrant") for each in (plain, fast))
        else:
            fastpeft.accelerate(fast, memory=fastpeft.LayerPolicy(how))

        def gradients(of: Any) -> dict[str, Tensor]:
            torch.manual_seed(5)
            out = of(**given, output_attentions=True)
            of.eval()(**given)  # whose weights nobody asks for
            of.train()
            of.zero_grad()
            loss = out.loss if how == "reentrant" else out.loss + sum(w.square().sum() for w in out.attentions)
            loss.backward()
            return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}

        gradients(fast)
        torch.testing.assert_close(gradients(fast), gradients(plain))
        assert not any("fastpeft" in name for m in fastpeft.restore(fast).modules() for name in vars(m))

    def test_an_evaluation_that_asks_for_weights_between_forward_and_backward(self) -> None:
        model = accelerated(make("gpt2")).train()
        fastpeft.accelerate(model, memory=fastpeft.LayerPolicy("recompute"))
        given = inputs(model, "none")

        def gradients(between: bool) -> dict[str, Tensor]:
            model.zero_grad()
            torch.manual_seed(5)
            loss = model(**given).loss
            if between:
                with torch.no_grad():
                    model.eval()(**given, output_attentions=True)
                model.train()
            loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        torch.testing.assert_close(gradients(True), gradients(False))

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_under_autocast_too(self, name: str) -> None:
        """Llama's queries are in fp32 there, GPT-2's are not."""
        model = make(name).eval()
        given = inputs(model, "none")
        with torch.autocast("cpu", torch.bfloat16):
            wanted = eager(model)(**given, output_attentions=True).attentions
            found = accelerated(model)(**given, output_attentions=True).attentions
        assert [weights.dtype for weights in found] == [weights.dtype for weights in wanted]

    @pytest.mark.parametrize("before", ["eager", "sdpa"])
    def test_no_mask_and_no_word_about_causality(self, before: str) -> None:
        """Mllama's cross-attention: eager sees all keys, sdpa as many as queries before; ours as what ran."""
        sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        layers = {"num_hidden_layers": 1, "cross_attention_layers": [0], "num_key_value_heads": 2, "pad_token_id": 0}
        model: Any = MllamaForCausalLM(MllamaTextConfig(**sizes, **layers, rope_parameters=rope)).eval()
        model.model.layers[0].cross_attn_attn_gate.data.fill_(1.0)
        model.set_attn_implementation(before)
        given = {"input_ids": inputs(model)["input_ids"], "cross_attention_states": torch.randn(2, 14, 32)}
        wanted = model(**given).logits
        torch.testing.assert_close(accelerated(model)(**given).logits, wanted)

    def test_a_mask_that_is_prepared(self) -> None:
        """Bool and additive ones of queries x keys."""
        model = make("llama").eval()
        ids = inputs(model)["input_ids"]
        seen = (torch.rand(2, 1, 11, 11) < 0.5).tril() | torch.eye(11, dtype=torch.bool)
        added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        wanted = eager(model)(input_ids=ids, attention_mask=added).logits
        accelerated(model)
        for mask in (seen, added):
            torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, wanted)
        assert "1 of 2 calls over a mask of queries x keys" in rows(model)[0].note

    def test_dropout_is_of_its_probability_and_of_torch_s_generator(self) -> None:
        model = make("llama")
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        given = inputs(accelerated(model))
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(**given).loss)
        assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
        model.eval()
        assert torch.equal(model(**given).loss, model(**given).loss)

    @pytest.mark.parametrize("transform", ["jvp", "vmap"])
    def test_inside_torch_func(self, transform: str) -> None:
        """PyTorch's fused attention knows neither; the model's own eager function serves."""
        model = make("llama").eval()
        ids, plain = inputs(model, "none", 24)["input_ids"], eager(model)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}

        def of(which: Any) -> Any:
            def logits(weights: Any, ids: Tensor) -> Any:
                return torch.func.functional_call(which, weights, kwargs={"input_ids": ids, "use_cache": False}).logits

            if transform == "jvp":
                return torch.func.jvp(lambda weights: logits(weights, ids), (weights,), (weights,))
            return torch.func.vmap(lambda row: logits(weights, row[None]))(ids)

        torch.testing.assert_close(of(accelerated(model)), of(plain))
        assert rows(model)[0].note == "1 of 1 calls by the model's own function: a torch.func transform"

    def test_autocast(self) -> None:
        model = make("llama")
        given, plain = inputs(model), eager(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted, ours = plain(**given).logits, accelerated(model)(**given).logits
        assert ours.dtype == wanted.dtype
        oracle = copy.deepcopy(plain).double()(**given).logits
        assert (ours.double() - oracle).norm() <= 2 * (wanted.double() - oracle).norm()


@contextmanager
def wrong_stop() -> Iterator[None]:
    """A planted leak: each query sees one key more than it may."""
    from fastpeft.integrations import attention_masks

    right = attention_masks._edges
    attention_masks._edges = lambda part, at: (right(part, at)[0], right(part, at)[1] + 1)  # type: ignore[assignment, operator]
    try:
        yield
    finally:
        attention_masks._edges = right


def test_a_planted_leak_is_caught() -> None:
    model = make("llama")
    with pytest.raises(AssertionError), wrong_stop():
        check(model, inputs(model, "left"))


def test_add_adapter_of_transformers_own() -> None:
    """A model that is no PeftModel."""
    model = make("llama")
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]))
    fastpeft.accelerate(model)
    assert len(rows(model)) == 2 and model.config._attn_implementation == "fastpeft"
