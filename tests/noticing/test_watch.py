"""Numbers that are none, and adapters that get no gradient, are noticed, once each; sane trainings are not."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, Trainer

import fastpeft
from fastpeft.noticing import dependence
from tests.integration.models import VOCABULARY, batch, checkpointed, make, make_base, with_lora
from tests.integration.test_trainers import Rows, arguments

from .watched import kinds, loop


class TestNotFinite:
    @pytest.mark.parametrize("accelerated", [False, True])
    def test_a_frozen_weight(self, accelerated: bool, caplog: pytest.LogCaptureFixture) -> None:
        model = make("llama")
        if accelerated:
            fastpeft.accelerate(model)
        weight = dict(model.named_parameters())["base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"]

        def break_it(step: int) -> None:
            if step == 4:
                with torch.no_grad():
                    weight[0, 0] = torch.nan

        with pytest.raises(FloatingPointError) as raised:
            loop(model, at=break_it)
        assert "the gradients of step 4 are no numbers" in str(raised.value)
        assert "the frozen parameter base_model.model.model.layers.1.mlp.down_proj.base_layer.weight" in str(
            raised.value
        )
        assert [record.getMessage() for record in caplog.records if record.name == "fastpeft"] == [str(raised.value)]

    def test_an_overflow_in_half_precision_names_the_module(self) -> None:
        model = make("bert", torch.float16)
        layers = model.get_base_model().bert.encoder.layer
        with torch.no_grad():
            layers[1].intermediate.dense.base_layer.weight.mul_(1e4)
            layers[1].output.dense.base_layer.weight.mul_(1e4)
        with pytest.raises(FloatingPointError, match=r"no number is base_model\.model\.bert\.encoder\.layer\.1\.\w+\."):
            loop(model, 3)

    def test_the_backward_pass_alone(self) -> None:
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (x * 0).sqrt()  # whose gradient there is none

        model = make("llama")
        mlp = model.get_base_model().model.layers[0].mlp
        mlp.act_fn = Root()
        with pytest.raises(
            FloatingPointError, match=r"backward pass of base_model\.model\.model\.layers\.0\.mlp$"
        ) as raised:
            loop(model, 3)
        assert "(10 of 28, the last is of base_model.model.model.layers.0.mlp.gate_proj" in str(raised.value)

    def test_training_that_runs_away(self) -> None:
        with pytest.raises(FloatingPointError, match="a lower learning rate"):
            loop(make("llama"), rate=1e30)

    def test_a_last_step_is_told_at_the_end(self) -> None:
        with pytest.raises(FloatingPointError, match="step 2"):
            loop(make("llama"), 2, rate=1e30)

    def test_losses_that_no_step_is_made_of(self) -> None:
        """As behind a gradient scaler: what is trained stays a number, the loss is none."""
        model = make("llama")
        with torch.no_grad():
            model.get_base_model().model.norm.weight[0] = torch.nan
        with fastpeft.watch(model) as watch:
            for _ in range(5):
                model(**batch(model))
        [notice] = watch.notices
        assert notice.kind == "loss" and "model.norm.weight holds NaN" in notice.text


class TestNoGradient:
    def test_reentrant_checkpoints_cut_it_off(self) -> None:
        model = make("bert")
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.disable_input_require_grads()
        [notice] = loop(model, 4).notices
        assert notice.kind == "no-gradient" and "enable_input_require_grads" in notice.text
        sane = loop(checkpointed(make("bert"), True), 4)
        assert kinds(sane) == []

    def test_modules_beside_the_loss(self) -> None:
        model = with_lora(make_base("bert"), "SEQ_CLS", target_modules=["query", "pooler.dense"]).train()
        pooler = model.get_base_model().bert.pooler
        pooler.forward = lambda hidden: hidden[:, 0]
        [notice] = loop(model).notices
        assert notice.text.startswith("1 of 3 adapters get no gradient (base_model.model.bert.pooler.dense)")

    def test_an_optimizer_of_other_parameters(self) -> None:
        base = make_base("llama")
        of_the_base = list(base.parameters())
        model = with_lora(base).train()
        [notice] = loop(model, train=of_the_base).notices
        assert notice.kind == "no-gradient" and "the optimizer holds no adapter" in notice.text

    def test_matrix_a_and_frozen_adapters_are_no_fault(self) -> None:
        fresh = get_peft_model(make_base("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in fresh.named_parameters():
            if ".layers.0." in name or "lora_A" in name:
                parameter.requires_grad_(False)
        assert kinds(loop(fresh.train())) == []

    def test_experts_without_tokens_are_no_fault(self) -> None:
        class Expert(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.experts = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

            def forward(self, input_ids: Tensor) -> Any:
                loss = self.experts[0](self.used(input_ids)).square().mean()
                return {"loss": loss}

        model = get_peft_model(Expert(), LoraConfig(target_modules="all-linear"))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with fastpeft.watch(model) as watch:
            for _ in range(12):
                model(torch.randn(2, 4))["loss"].backward()
                optimizer.step()
        assert kinds(watch) == []


class TestSane:
    @pytest.mark.parametrize("steps", [4, 14])
    def test_steps_without_a_loss(self, steps: int) -> None:
        """As of GRPO, where all answers are rewarded alike: gradients are there, and zero."""
        model = make("llama")
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        with fastpeft.watch(model) as watch:
            for _ in range(steps):
                (model(input_ids=batch(model)["input_ids"]).logits.mean() * 0).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert kinds(watch) == []

    @pytest.mark.parametrize(
        ("name", "accelerated"),
        [
            ("llama", True),
            ("bert", False),
            *(pytest.param(*case, marks=pytest.mark.full) for case in product(["t5", "bart"], [False, True])),
            *(pytest.param(*case, marks=pytest.mark.full) for case in [("llama", False), ("bert", True)]),
        ],
    )
    def test_silent_and_the_same_numbers(self, name: str, accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dependence, "TRIALS", (2, 3, 4))
        ends = []
        for watched in (False, True):
            torch.manual_seed(0)
            model = make(name, lora_dropout=0.2)
            if accelerated:
                fastpeft.accelerate(model)
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
            with fastpeft.watch(model) if watched else nullcontext() as watch:
                for _ in range(4):
                    for _ in range(2):  # accumulated
                        model(**batch(model)).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
        assert torch.equal(*ends)
        assert watch is not None and watch.notices == () and not watch._dependence._left, "it was tried"

    @pytest.mark.parametrize("fused", [False, True])
    def test_overflows_behind_a_gradient_scaler(self, fused: bool) -> None:
        model = make("llama")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28, growth_interval=3)
        scales = []
        with fastpeft.watch(model) as watch:
            for _ in range(20):
                with torch.autocast("cpu", torch.float16):
                    loss = model(**batch(model)).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scales.append(scaler.get_scale())
        assert min(scales) < 2.0**28 and kinds(watch) == []

    def test_a_masked_language_model(self) -> None:
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )

        def masked(model: nn.Module) -> dict[str, Tensor]:
            given = batch(make_base("llama", num_hidden_layers=1))
            given["labels"][torch.rand(given["labels"].shape) > 0.3] = -100
            return given

        model = with_lora(BertForMaskedLM(config), None).train()
        assert kinds(loop(model, batches=masked)) == []

    def test_evaluation_within_training_is_not_looked_at(self) -> None:
        model = make("llama")

        def evaluate(step: int) -> None:
            with torch.no_grad():
                model(input_ids=torch.full((1, 4), 5), labels=torch.full((1, 4), -100))

        assert kinds(loop(model, at=evaluate)) == []

    def test_a_compiled_model_stays_in_one_graph(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with fastpeft.watch(model) as watch:
            for _ in range(12):
                compiled(torch.randn(2, 4)).sum().backward()
                optimizer.step()
        assert kinds(watch) == []


class TestTrainer:
    def test_a_trainer_of_transformers(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        model = make("llama")
        trainer = Trainer(model, arguments(tmp_path, max_grad_norm=1.0, learning_rate=1e30), train_dataset=Rows(model))
        with pytest.raises(FloatingPointError, match="step 2"), fastpeft.watch(trainer):
            trainer.train()

    def test_a_sane_one(self, tmp_path: Path) -> None:
        model = make("llama")
        rows = Rows(model)
        settings = arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="epoch", num_train_epochs=2)
        trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
        with fastpeft.watch(trainer) as watch:
            trainer.train()
        assert kinds(watch) == []

    def test_what_is_no_model(self) -> None:
        with pytest.raises(
            TypeError, match=r"model: expected a torch\.nn\.Module or a Trainer of transformers, got str"
        ):
            fastpeft.watch("model")
