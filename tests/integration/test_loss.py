"""Whole models whose losses need no logits: the same loss and gradients, and logits for whoever reads them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import fastpeft
from fastpeft.layers.head_call import HeadCall
from fastpeft.layers.lazy_logits import LazyLogits, plain
from fastpeft.reporting import ReportRow
from tests.integration.models import _DECODER, _ENCODER, ARCHITECTURES, VOCABULARY, batch, make, make_base, with_lora
from tests.integration.reports import shape_of
from tests.integration.steps import assert_step_close, step, truth

full = pytest.mark.full
ON_HEAD = ["q_proj", "v_proj", "lm_head"]
GENERATORS = [name for name in ARCHITECTURES if ARCHITECTURES[name].task != "SEQ_CLS"]
SERVED = [pytest.param(n, marks=[] if n in ("llama", "gemma2", "t5") else full) for n in GENERATORS]


def loss_row(model: nn.Module) -> ReportRow:
    (row,) = [row for row in fastpeft.report(model).rows if row.kind == "loss"]
    return row


@contextmanager
def never_made() -> Iterator[None]:
    """Within it nobody may make logits, in eager mode."""

    def refuse(call: HeadCall) -> Tensor:
        raise AssertionError("logits were made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadCall, "logits", refuse)
        yield


def assert_served(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    """Two accelerated steps are the plain model's, without logits."""
    exact, peft = truth(model, inputs), step(model, inputs)
    fastpeft.accelerate(model)
    with never_made():
        for _ in range(2):
            assert_step_close(step(model, inputs), peft, exact)
    row = loss_row(model)
    assert row.op == "loss without logits" and not row.note


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if type(tensor) is Tensor and not tensor.is_meta:
                self.elements = max(self.elements, tensor.numel())
        return results


def masked_model() -> PeftModel:
    config = BertConfig(**{k: v for k, v in _ENCODER.items() if k != "num_labels"}, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    return with_lora(BertForMaskedLM(config), None, target_modules=["query", "value"]).train()


def others(name: str) -> nn.Module:
    if name == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**_DECODER, final_logit_softcapping=5.0))
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**_DECODER, logit_scale=0.25))
    return GraniteForCausalLM(GraniteConfig(**_DECODER, logits_scaling=4.0))


class TestModels:
    @pytest.mark.parametrize("name", SERVED)
    def test_each_architecture(self, name: str) -> None:
        model = make(name)
        assert_served(model, batch(model))

    @pytest.mark.parametrize("name", [pytest.param(n, marks=full) for n in ("gemma3", "cohere", "granite")])
    def test_scaled_and_capped_logits(self, name: str) -> None:
        model = with_lora(others(name)).train()
        assert_served(model, batch(model))

    def test_masked_language_model(self) -> None:
        model = masked_model()
        inputs = batch(model)
        inputs["labels"] = inputs["labels"].masked_fill(torch.rand(inputs["labels"].shape) < 0.8, -100)
        inputs["labels"][0, 0] = 5
        assert_served(model, inputs)

    def test_classification_is_left_alone(self) -> None:
        model = fastpeft.accelerate(make("bert"))
        assert not [row for row in fastpeft.report(model).rows if row.kind == "loss"]
        assert type(model(**batch(model)).logits) is Tensor

    def test_packed_rows_and_items_of_the_whole_batch(self) -> None:
        model = make()
        inputs: dict[str, Any] = batch(model, rows=1, tokens=12)
        inputs["position_ids"] = torch.tensor([[*range(5), *range(7)]])
        inputs.pop("attention_mask")
        inputs["num_items_in_batch"] = torch.tensor(37)
        model.config.use_cache = False  # with a cache the plain model mixes the documents
        assert_served(model, inputs)

    @pytest.mark.parametrize("on_head", [pytest.param(False, marks=full), True])
    def test_nothing_of_tokens_by_words_is_made(self, on_head: bool) -> None:
        words, tokens = 9000, 320
        base = LlamaForCausalLM(
            LlamaConfig(**_DECODER | {"vocab_size": words, "hidden_size": 16, "num_hidden_layers": 1})
        )
        model = with_lora(base, target_modules=ON_HEAD if on_head else ["q_proj"])
        ids = torch.randint(3, words, (2, tokens))
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        largest = []
        for switch in (False, True):
            fastpeft.accelerate(model, loss=switch)
            step(model, {"input_ids": ids[:, :4], "labels": ids[:, :4]})
            with Largest() as watched:
                model(**inputs).loss.backward()
            largest.append(watched.elements)
        assert largest[0] == 2 * tokens * words and largest[1] <= largest[0] // 8

    def test_no_label_at_all(self) -> None:
        model = fastpeft.accelerate(make())
        inputs = batch(model)
        inputs["labels"].fill_(-100)
        assert model(**inputs).loss.isnan()
        loss = model(**inputs, num_items_in_batch=3).loss
        loss.backward()
        assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())

    @full
    def test_checkpointed(self) -> None:
        model = make()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        assert_served(model, batch(model))


class TestHeads:
    @pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=full), pytest.param("phi3", marks=full)])
    def test_lora(self, name: str) -> None:
        model = make(name, target_modules=[*(["qkv_proj"] if name == "phi3" else []), *ON_HEAD])
        assert_served(model, batch(model))

    @full
    def test_lora_with_a_bias_of_its_own(self) -> None:
        model = make(target_modules=ON_HEAD, lora_bias=True)
        assert_served(model, batch(model))

    def test_two_adapters_at_once(self) -> None:
        model = make(target_modules=ON_HEAD)
        model.add_adapter("other", LoraConfig(r=2, target_modules=ON_HEAD, init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
        assert_served(model, batch(model))

    def test_lora_with_dropout_draws_as_peft(self) -> None:
        model = make(target_modules=["lm_head"], lora_dropout=0.5)
        inputs, steps = batch(model), []
        for _ in range(2):
            torch.manual_seed(3)
            steps.append(step(model, inputs))
            fastpeft.accelerate(model)
            model(**inputs)
        torch.testing.assert_close(steps[0].loss, steps[1].loss)
        for name, gradient in steps[0].gradients.items():
            torch.testing.assert_close(steps[1].gradients[name], gradient, rtol=1e-4, atol=1e-6)

    def test_logits_with_dropout_are_those_of_the_loss(self) -> None:
        model = fastpeft.accelerate(make(target_modules=["lm_head"], lora_dropout=0.5))
        inputs = batch(model)
        outputs = model(**inputs)
        logits = plain(outputs.logits)[:, :-1].flatten(0, 1)
        torch.testing.assert_close(nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()), outputs.loss)

    def test_tied(self) -> None:
        model = with_lora(make_base(tie_word_embeddings=True)).train()
        assert_served(model, batch(model))

    def test_trained_and_saved_as_a_whole(self) -> None:
        model = make(modules_to_save=["lm_head"])
        assert_served(model, batch(model))

    @full
    def test_trained_in_place_and_tied(self) -> None:
        model = with_lora(make_base(tie_word_embeddings=True)).train()
        model.get_base_model().lm_head.weight.requires_grad_(True)
        assert_served(model, batch(model))

    def test_dora_and_disabled_adapters_make_logits(self) -> None:
        model = make(target_modules=ON_HEAD, use_dora=True)
        inputs = batch(model)
        exact, peft = truth(model, inputs), step(model, inputs)
        assert_step_close(step(fastpeft.accelerate(model), inputs), peft, exact)
        assert loss_row(model).note == "1 of 1 calls with logits: DoRA"
        with model.disable_adapter():
            assert type(model(**inputs).logits) is Tensor
        assert "adapters disabled" in loss_row(model).note

    def test_left_alone(self) -> None:
        model = fastpeft.accelerate(make(target_modules=ON_HEAD), lora=False)
        assert "which is not accelerated itself" in loss_row(model).note
        model = fastpeft.accelerate(make(trainable_token_indices={"lm_head": [1, 2]}), lora=False)
        assert "TrainableTokensLayer, which is not accelerated itself" in loss_row(model).note
        model = fastpeft.accelerate(make(), loss=False)
        assert loss_row(model).note == "loss=False" and type(model(**batch(model)).logits) is Tensor

    @full
    def test_over_four_bits(self) -> None:
        from tests.integration.quantised import make_quantised

        model = fastpeft.accelerate(make_quantised("llama"))
        inputs = batch(model)
        with never_made():
            model(**inputs).loss.backward()
        assert not loss_row(model).note


def chameleon(targets: list[str]) -> PeftModel:
    """Which writes into its logits, in forward: the words of pictures, here 1 and 2, get the least number there is."""
    pictures = {"resolution": 16, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    pictures |= {"embed_dim": 8, "latent_channels": 8, "num_embeddings": 8}
    words = {"<image>": 0, "IMGIMGAZ": 1, "IMGIMGBZ": 2}
    sizes = {name: value for name, value in _DECODER.items() if name != "head_dim"}
    base = ChameleonForConditionalGeneration(ChameleonConfig(**sizes, vq_config=pictures, vocabulary_map=words))
    return with_lora(base, target_modules=targets).train()


class TestLogits:
    @pytest.mark.parametrize("head", ["adapted", *(pytest.param(each, marks=full) for each in ("frozen", "trained"))])
    def test_a_model_that_writes_into_them(self, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are made, once a call, with what was written, and the loss is of these."""
        model = chameleon(ON_HEAD if head == "adapted" else ON_HEAD[:2])
        if head == "trained":
            model.base_model.model.lm_head.weight.requires_grad_()
        inputs = batch(model)
        exact, peft, wanted = truth(model, inputs), step(model, inputs), model(**inputs).logits
        fastpeft.accelerate(model)
        for _ in range(2):
            assert_step_close(step(model, inputs), peft, exact)
        make_logits, made = HeadCall.logits, []
        monkeypatch.setattr(HeadCall, "logits", lambda call: made.append(call) or make_logits(call))
        logits = model(**inputs).logits
        torch.testing.assert_close(plain(logits), wanted, rtol=1e-4, atol=1e-5)
        assert (logits[..., 1:3] == torch.finfo(torch.float32).min).all() and len(made) == 1
        expected = "3 of 3 calls with logits: logits asked for before a loss, by aten."
        written = loss_row(model).note.removeprefix(expected)
        assert written in ("index_put_.default", "index_fill_.int_Scalar")  # up to torch 2.14, and since

    def test_are_the_plain_model_s(self) -> None:
        model = make()
        inputs = batch(model)
        wanted = model(**inputs).logits
        outputs = fastpeft.accelerate(model)(**inputs)
        assert type(outputs.logits) is LazyLogits
        torch.testing.assert_close(outputs.logits.log_softmax(-1), wanted.log_softmax(-1), rtol=1e-4, atol=1e-5)
        assert "logits asked for after a loss, by aten._log_softmax.default" in loss_row(model).note

    def test_their_gradients_too(self) -> None:
        """A loss of one's own beside the model's."""
        model = make(target_modules=ON_HEAD)
        inputs, found = batch(model), []
        for _ in range(2):
            model.zero_grad()
            outputs = model(**inputs)
            (outputs.loss + outputs.logits.square().mean()).backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            fastpeft.accelerate(model)
            model(**inputs)
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)

    def test_without_labels(self) -> None:
        model = fastpeft.accelerate(make())
        inputs = batch(model)
        labels = inputs.pop("labels")
        assert type(model(**inputs).logits) is Tensor
        with pytest.raises(ValueError, match="batch_size"):
            model(**inputs, labels=labels[:1])
        assert type(model(**inputs).logits) is Tensor, "after an exception too"

    def test_a_loss_only_evaluation(self) -> None:
        model = make().eval()
        inputs = batch(model)
        with torch.no_grad():
            wanted = model(**inputs).loss
            fastpeft.accelerate(model)
            with never_made():
                torch.testing.assert_close(model(**inputs).loss, wanted)

    def test_tuples(self) -> None:
        model = fastpeft.accelerate(make())
        loss, logits, *_ = model(**batch(model), return_dict=False)
        assert logits.shape[-1] == VOCABULARY and loss.requires_grad


class TestModules:
    def test_restored(self) -> None:
        model = make(target_modules=ON_HEAD[:2])
        before = shape_of(model)
        fastpeft.restore(fastpeft.accelerate(model))
        assert shape_of(model) == before
        fastpeft.accelerate(fastpeft.accelerate(model))
        assert len(model._forward_hooks) == 1, "not one more at each call"
        fastpeft.accelerate(model, loss=False, lora=False, mlp=False, attention=False)
        assert shape_of(model).keys() == before.keys() and type(model.get_base_model().lm_head) is nn.Linear

    def test_copied_and_pickled(self) -> None:
        model = make()
        inputs = batch(model)
        wanted = step(fastpeft.accelerate(model), inputs)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with never_made():
                assert step(other, inputs).equals(wanted)
            assert type(fastpeft.restore(other).get_base_model().lm_head) is nn.Linear
        assert loss_row(model).op

    def test_a_copy_of_the_head_takes_nothing_along(self) -> None:
        model = fastpeft.accelerate(make())
        head = copy.deepcopy(model.get_base_model().lm_head)
        assert type(head(torch.randn(2, 3, 64))) is Tensor
        assert len(pickle.dumps(head)) < 4 * sum(p.numel() for p in head.parameters()) + 4000

    def test_adapters_put_on_the_head_later(self) -> None:
        base = make_base()
        inputs = batch(base)
        fastpeft.accelerate(base)
        model = with_lora(base, target_modules=ON_HEAD)
        fastpeft.accelerate(model)
        assert model(**inputs).loss.requires_grad and not loss_row(model).note
        assert type(fastpeft.restore(model).get_base_model().lm_head.base_layer) is nn.Linear

    @pytest.mark.parametrize("head", [False, pytest.param(True, marks=full)])
    def test_verified(self, head: bool) -> None:
        model = fastpeft.accelerate(make(**({"target_modules": ON_HEAD} if head else {})))
        outcome = fastpeft.verify(model)
        assert outcome.passed, str(outcome)
        assert not loss_row(model).note

    def test_a_wrong_loss_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        served = HeadCall.loss
        monkeypatch.setattr(HeadCall, "loss", lambda *args, **options: served(*args, **options) * 1.01)
        outcome = fastpeft.verify(fastpeft.accelerate(make()))
        assert {"loss"} <= {check.what for check in outcome.failures}

    def test_a_model_around_another_with_the_same_head(self) -> None:
        sizes = {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes.pop("num_labels")
        config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), BertConfig(**sizes))
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        model = EncoderDecoderModel(config).train()
        ids = torch.randint(3, VOCABULARY, (2, 6))
        wanted = model(input_ids=ids, labels=ids).loss
        hooks = []
        for _ in range(3):
            fastpeft.accelerate(model)
            with never_made():
                torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, wanted)
            rows = [row for row in fastpeft.report(model).rows if row.kind == "loss"]
            assert [(row.op, row.note) for row in rows] == [("loss without logits", "")] * 2
            hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
        assert hooks[0] == hooks[1] == hooks[2]
        fastpeft.restore(model)
        assert type(model(input_ids=ids, labels=ids).logits) is Tensor
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
