"""Losses without logits in transformers' and TRL's trainers, under accelerate and DDP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

import fastpeft
from fastpeft.layers.lazy_logits import LazyLogits
from tests.integration.models import batch, make, with_lora
from tests.integration.test_loss import ON_HEAD, loss_row, masked_model, never_made, others
from tests.integration.test_trainers import Rows, arguments, plain_arguments, tokenizer
from tests.integration.test_training import flat, trained_values

full = pytest.mark.full


def losses(trainer: Trainer) -> Tensor:
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])


TARGETS = {"llama": ON_HEAD, "t5": ["q", "v"], "phi3": ["qkv_proj"], "masked": ["query", "value"]}


def adapted(name: str) -> nn.Module:
    """A tiny model with LoRA; "masked" is BERT with its masked-language-model head."""
    if name == "masked":
        return masked_model()
    targets = TARGETS.get(name, ["q_proj", "v_proj"])
    return (
        with_lora(others(name), target_modules=targets).train()
        if name == "gemma3"
        else make(name, target_modules=targets)
    )


class TestTrainer:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("llama", {"gradient_accumulation_steps": 4}),
            pytest.param("llama", {"gradient_accumulation_steps": 1}, marks=full),
            pytest.param("llama", {"gradient_accumulation_steps": 4, "bf16": True}, marks=full),
            pytest.param("t5", {"gradient_accumulation_steps": 4}, marks=full),
            ("gemma3", {"gradient_accumulation_steps": 4}),
            *(
                pytest.param(name, {"gradient_accumulation_steps": steps}, marks=full)
                for name in ("qwen3", "gemma2", "gemma3", "phi3", "bart", "marian", "masked")
                for steps in (1, 4)
                if (name, steps) != ("gemma3", 4)
            ),
        ],
    )
    def test_accumulation(self, name: str, options: dict[str, Any], tmp_path: Path) -> None:
        """The labels of one accumulated step are counted together."""
        start, found = adapted(name), []
        for accelerated in (False, True):
            model = copy.deepcopy(start)
            if accelerated:
                fastpeft.accelerate(model)
            rows = Rows(model, 32)
            trainer = Trainer(model, arguments(tmp_path, logging_steps=1, **options), train_dataset=rows)
            trainer.train()
            found.append((losses(trainer), flat(trained_values(model)) - flat(trained_values(start))))
        exact = not options.get("bf16")
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4 if exact else 2e-2, atol=0)
        assert found[0][1].norm() > 0.1, "nothing was trained"
        assert (found[1][1] - found[0][1]).norm() < (0.02 if exact else 0.2) * found[0][1].norm()
        assert loss_row(model).op and not loss_row(model).note

    def test_evaluation(self, tmp_path: Path) -> None:
        def accuracy(prediction: EvalPrediction) -> dict[str, float]:
            assert isinstance(prediction.predictions, type(prediction.label_ids)), "arrays"
            hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
            return {"hits": float(hits.sum()), "sum": float(prediction.predictions.sum())}

        found = []
        plain = make()
        for model in (plain, fastpeft.accelerate(copy.deepcopy(plain))):
            for metrics in (None, accuracy):
                trainer = Trainer(model, arguments(tmp_path), eval_dataset=Rows(model), compute_metrics=metrics)
                found.append({k: v for k, v in trainer.evaluate().items() if "loss" in k or "hits" in k or "sum" in k})
                if model is not plain and metrics is None:
                    assert not loss_row(model).note, "an evaluation of the loss alone makes no logits"
        assert found[2] == pytest.approx(found[0], rel=1e-5) and found[3] == pytest.approx(found[1], rel=1e-4)
        assert "after a loss" in loss_row(model).note

    @full
    def test_label_smoothing_and_a_loss_of_one_s_own(self, tmp_path: Path) -> None:
        """Both call the model without labels, and read its logits."""

        def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            assert type(outputs.logits) is Tensor
            return outputs.logits[:, :-1].logsumexp(-1).mean()

        for options, more in (({"label_smoothing_factor": 0.1}, {}), ({}, {"compute_loss_func": own})):
            start, moved = make(), []
            for accelerated in (False, True):
                model = copy.deepcopy(start)
                if accelerated:
                    fastpeft.accelerate(model)
                Trainer(model, arguments(tmp_path, **options), train_dataset=Rows(model), **more).train()
                moved.append(flat(trained_values(model)) - flat(trained_values(start)))
            assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


@full
class TestTRL:
    @pytest.mark.parametrize("packing", [False, True])
    def test_sft(self, packing: bool, tmp_path: Path) -> None:
        from datasets import Dataset as Table
        from trl import SFTConfig, SFTTrainer

        start, ids, found = make(), torch.randint(3, 95, (16, 12)).tolist(), []
        for accelerated in (False, True):
            model = copy.deepcopy(start)
            if accelerated:
                fastpeft.accelerate(model)
            settings = SFTConfig(
                **plain_arguments(tmp_path, logging_steps=1),
                max_length=12,
                packing=packing,
                loss_type="nll",
                dataset_kwargs={"skip_prepare_dataset": True},
            )
            rows = [{"input_ids": each, "labels": each} for each in ids]
            trainer = SFTTrainer(model, settings, train_dataset=Table.from_list(rows), processing_class=tokenizer())
            trainer.train()
            found.append((losses(trainer), flat(trained_values(model)) - flat(trained_values(start))))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
        assert (found[1][1] - found[0][1]).norm() < 0.02 * found[0][1].norm()
        assert not loss_row(model).note

    def test_sft_refuses_adapters_on_the_head(self, tmp_path: Path) -> None:
        from datasets import Dataset as Table
        from trl import SFTConfig, SFTTrainer

        model = fastpeft.accelerate(make(target_modules=ON_HEAD))
        rows = Table.from_list([{"input_ids": [3, 4, 5]}])
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            SFTTrainer(model, SFTConfig(**plain_arguments(tmp_path)), train_dataset=rows, processing_class=tokenizer())

    def test_outside_its_trainer_the_model_is_ours_again(self, tmp_path: Path) -> None:
        """TRL binds a forward of its own to the instance."""
        from trl.trainer.utils import add_fused_lm_head

        model = make()
        inputs = batch(model)
        wanted = model(**inputs).loss
        add_fused_lm_head(model.get_base_model())
        fastpeft.accelerate(model)
        with never_made():
            torch.testing.assert_close(model(**inputs).loss, wanted)
            torch.testing.assert_close(model(**inputs, fused_lm_head=True).loss, wanted)


@full
@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(unused: bool, tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain = make(target_modules=ON_HEAD)
        inputs, found = batch(plain), []
        for model in (plain, fastpeft.accelerate(copy.deepcopy(plain))):
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            for _ in range(2):
                model.zero_grad()
                outputs = wrapped(**inputs)
                outputs.loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert type(outputs.logits) is LazyLogits
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


@full
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_under_accelerate(mixed_precision: str) -> None:
    """Which turns all of a model's outputs into fp32, logits too."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    plain = make(target_modules=ON_HEAD)
    inputs, found = batch(plain), []
    for model in (plain, fastpeft.accelerate(copy.deepcopy(plain))):
        prepared = Accelerator(cpu=True, mixed_precision=mixed_precision).prepare(model)
        for _ in range(2):
            model.zero_grad()
            outputs = prepared(**inputs)
            outputs.loss.backward()
        assert outputs.logits.dtype == torch.float32
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((outputs.loss.detach(), gradients, outputs.logits.detach().sum()))
    slack = 1e-4 if mixed_precision == "no" else 3e-2
    for mine, other in zip(found[1], found[0], strict=True):
        assert mine.dtype == other.dtype and (mine - other).norm() <= slack * other.norm()
