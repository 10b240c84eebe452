"""Trainings that go wrong in seven ways are noticed, once each; sane ones are not."""

from __future__ import annotations

from collections.abc import Callable
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

Batches = Callable[[nn.Module], dict[str, Tensor]]


def kinds(watch: Any) -> list[str]:
    return [notice.kind for notice in watch.notices]


def loop(
    model: nn.Module,
    steps: int = 9,
    *,
    batches: Batches = batch,
    rate: float = 1e-2,
    at: Callable[[int], object] = lambda step: None,
    train: Any = None,
    **given: Any,
) -> Any:
    """A user's own; `at` is called before each step. Gives what watched."""
    optimizer = torch.optim.AdamW(train or [p for p in model.parameters() if p.requires_grad], lr=rate)
    with fastpeft.watch(model, **given) as watch:
        for step in range(1, steps + 1):
            at(step)
            model(**batches(model)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return watch


class Late:
    """Batches of another kind after the first."""

    def __init__(self, first: int, before: Batches, after: Batches) -> None:
        self.left, self.before, self.after = first, before, after

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        self.left -= 1
        return (self.before if self.left >= 0 else self.after)(model)


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


class TestData:
    def test_all_labels_are_ignored(self) -> None:
        def ignored(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            return given | {"labels": torch.full_like(given["labels"], -100)}

        [notice] = loop(make("llama"), batches=ignored).notices
        assert notice.kind == "no-labels" and "all labels of the first 8 batches are -100" in notice.text
        [notice] = loop(make("llama"), 2, batches=ignored).notices
        assert "all labels of the first 2 batches are -100" in notice.text

        model = make("llama")
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        with fastpeft.watch(model) as watch:
            for _ in range(9):
                model(**ignored(model)).logits.square().mean().backward()  # a loss of the script's own
                optimizer.step()
        assert kinds(watch) == []

    def test_batches_whose_labels_are_ignored_later(self) -> None:
        def ignored(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            return given | {"labels": torch.full_like(given["labels"], -100)}

        late = Late(8, batch, ignored)
        [notice] = loop(make("llama"), 12, batches=late).notices
        assert notice.kind == "loss" and "all labels of the batch are -100" in notice.text

    def test_padding_that_attention_hides(self) -> None:
        def careless(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            return given | {"labels": given["input_ids"]}

        [notice] = loop(make("llama"), batches=careless).notices
        assert notice.kind == "padding" and notice.text.startswith("3 of the 30 labels")

    @pytest.mark.parametrize("name", ["llama", "t5"])
    def test_padding_without_a_mask(self, name: str) -> None:
        def careless(model: nn.Module) -> dict[str, Tensor]:
            ids = torch.randint(3, VOCABULARY, (3, 12))
            ids[1:, 6:] = 0
            return {"input_ids": ids, "labels": ids}

        [notice] = loop(make(name), batches=careless).notices
        assert (
            notice.kind == "padding"
            and "2 of the 3 rows of a batch learn to write the padding token (id 0)" in notice.text
        )

    def test_ends_of_text_that_are_the_padding_token_are_no_fault(self) -> None:
        def ended(model: nn.Module) -> dict[str, Tensor]:
            ids = torch.randint(3, VOCABULARY, (3, 12))
            ids[:, -2:] = 0
            return {"input_ids": ids, "labels": ids}

        assert kinds(loop(make("llama"), batches=ended)) == []

    def test_an_id_without_an_embedding(self) -> None:
        def foreign(model: nn.Module) -> dict[str, Tensor]:
            given = batch(model)
            given["input_ids"][0, 0] = VOCABULARY
            return given

        with pytest.raises(IndexError), fastpeft.watch(make("llama")) as watch:
            watch.model(**foreign(watch.model))
        [notice] = watch.notices
        assert notice.text.startswith(
            f"input_ids: expected token ids below {VOCABULARY}, which is how many the model has, got 96"
        )

    @pytest.mark.parametrize(("tokens", "said"), [(97, True), (96, False), (40, False)])
    def test_a_tokenizer_with_more_tokens(self, tokens: int, said: bool) -> None:
        with fastpeft.watch(make("llama"), tokenizer=range(tokens)) as watch:
            pass
        assert kinds(watch) == ["vocabulary"] * said

    def test_another_models_tokenizer(self) -> None:
        model = nn.Module()
        model.get_input_embeddings = lambda: nn.Embedding(50257, 1)  # type: ignore[assignment]
        for tokens, said in ((32000, True), (50000, False)):
            with fastpeft.watch(model, tokenizer=range(tokens)) as watch:
                pass
            assert kinds(watch) == ["vocabulary"] * said

    @pytest.mark.parametrize("as_table", [False, True])
    def test_evaluation_rows_that_are_trained_on(self, as_table: bool) -> None:
        from datasets import Dataset

        def rows(*ids: int) -> Any:
            given = [{"input_ids": [one, 1, 2], "labels": one % 2} for one in ids]
            return Dataset.from_list(given) if as_table else given

        model = make("llama")
        with fastpeft.watch(model, train_dataset=rows(4, 5, 6), eval_dataset=rows(7, 6, 5)) as watch:
            pass
        assert [notice.text for notice in watch.notices] == [
            "2 rows (2, 3) of the evaluation's 3 have a text that is trained on: they measure memory"
        ]
        with fastpeft.watch(model, train_dataset=rows(4, 5), eval_dataset={"one": rows(6), "two": rows(5)}) as watch:
            pass
        assert watch.notices[0].text.startswith("two: 1 row (1)")
        for other in (rows(7), rows(), None, iter([1]), 3, [object()]):
            with fastpeft.watch(model, train_dataset=rows(4, 5, 6), eval_dataset=other) as watch:
                pass
            assert kinds(watch) == []


class Constant(nn.Module):
    """A classifier whose loss knows the labels alone, or, with `begins`, what it reads once it has learned."""

    def __init__(self, begins: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)
        self.begins = begins
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        read = self.embedding(input_ids).mean(1)
        return {"loss": nn.functional.cross_entropy(self.head(read if self.begins else torch.ones_like(read)), labels)}


class TestInput:
    @pytest.mark.parametrize("begins", [False, True])
    def test_the_loss_does_not_depend_on_it(self, begins: bool) -> None:
        def read(model: nn.Module) -> dict[str, Tensor]:
            return {"input_ids": torch.randint(3, VOCABULARY, (6, 8)), "labels": torch.arange(6) % 3}

        model = Constant(begins)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with fastpeft.watch(model) as watch:
            for _ in range(max(dependence.TRIALS) + 5):
                model(**read(model))["loss"].backward()
                optimizer.step()
        assert kinds(watch) == ["no-input"] * (not begins)

    def test_all_rows_are_the_same(self) -> None:
        def same(model: nn.Module) -> dict[str, Tensor]:
            return {"input_ids": torch.full((3, 10), 7), "labels": torch.tensor([0, 1, 2])}

        def one(model: nn.Module) -> dict[str, Tensor]:
            return same(model) | {"labels": torch.tensor([1, 1, 1])}

        [notice] = loop(make("bert"), batches=same).notices
        assert notice.kind == "no-input" and notice.text.startswith("all 24 rows of the first 8 batches")
        assert kinds(loop(make("bert"), batches=one)) == [], "one row that is learned by heart"


class TestSane:
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
