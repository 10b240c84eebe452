"""transformers' and TRL's trainers, on CPU: accelerated before or after they are built, the steps are PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastpeft
from tests.integration.models import batch, make, make_base
from tests.integration.reports import notes, siblings
from tests.integration.test_training import flat, trained_values


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, model: nn.Module, count: int = 12) -> None:
        torch.manual_seed(0)
        self.rows = batch(model, rows=count)

    def __len__(self) -> int:
        return len(self.rows["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.rows.items()}


class TestTrainer:
    @pytest.mark.parametrize(
        "options", [{}, {"gradient_checkpointing": True}, pytest.param({"bf16": True}, marks=pytest.mark.full)]
    )
    def test_accelerated_before_or_after_the_trainer(self, options: dict[str, Any], tmp_path: Path) -> None:
        peft = make()
        values = []
        for when in ("never", "before", "after"):
            model = copy.deepcopy(peft)
            if when == "before":
                fastpeft.accelerate(model)
            trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=Rows(model))
            if when == "after":
                fastpeft.accelerate(model)
            trainer.train()
            assert trainer.state.global_step == 3
            values.append(flat(trained_values(model)) - flat(trained_values(peft)))
            assert when == "never" or siblings(model)
        for moved in values[1:]:
            assert (moved - values[0]).norm() < (0.2 if options.get("bf16") else 0.02) * values[0].norm()

    @pytest.mark.full
    def test_stopped_and_resumed(self, tmp_path: Path) -> None:
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step == 2

        peft = make(lora_dropout=0.1)
        whole, part = (fastpeft.accelerate(copy.deepcopy(peft)) for _ in range(2))
        settings = arguments(tmp_path, save_strategy="steps", save_steps=1)
        Trainer(whole, arguments(tmp_path / "whole"), train_dataset=Rows(whole)).train()
        Trainer(part, settings, train_dataset=Rows(part), callbacks=[Stop()]).train()
        again = fastpeft.accelerate(copy.deepcopy(peft))
        Trainer(again, settings, train_dataset=Rows(again)).train(resume_from_checkpoint=True)
        torch.testing.assert_close(flat(trained_values(again)), flat(trained_values(whole)))


@pytest.mark.full
class TestTRL:
    def test_supervised_with_lora_config(self, tmp_path: Path) -> None:
        from datasets import Dataset as Table
        from trl import SFTConfig, SFTTrainer

        base, ids = make_base(), torch.randint(3, 95, (8, 12)).tolist()
        results = []
        for wrap in (fastpeft.lora_config, lambda config: config):
            torch.manual_seed(1)
            trainer = SFTTrainer(
                copy.deepcopy(base),
                SFTConfig(
                    **plain_arguments(tmp_path),
                    max_length=12,
                    loss_type="nll",
                    dataset_kwargs={"skip_prepare_dataset": True},
                ),
                train_dataset=Table.from_dict({"input_ids": ids}),
                peft_config=wrap(LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
                processing_class=tokenizer(),
            )
            trainer.train()
            results.append((trainer.model, flat(trained_values(trainer.model))))
        assert fastpeft.report(results[0][0]).accelerated and not notes(results[0][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-3)

    def test_preferences(self, tmp_path: Path) -> None:
        """DPO also runs the reference policy through the same model."""
        from datasets import Dataset as Table
        from trl import DPOConfig, DPOTrainer

        rows = {"prompt": ["w3 w4 w5"] * 8, "chosen": [" w6 w7", " w8"] * 4, "rejected": [" w9 w10", " w11"] * 4}
        start, ends = make(), []
        for model in (copy.deepcopy(start), fastpeft.accelerate(copy.deepcopy(start))):
            settings = DPOConfig(**plain_arguments(tmp_path))
            table = Table.from_dict(rows)
            DPOTrainer(model, args=settings, train_dataset=table, processing_class=tokenizer()).train()
            ends.append(flat(trained_values(model)) - flat(trained_values(start)))
        assert ends[0].norm() > 0.1, "nothing was trained"
        assert (ends[1] - ends[0]).norm() < 0.02 * ends[0].norm()
        assert siblings(model)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(4, 96))]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **special)


def plain_arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "seed": 5,
        **options,
    }


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(**plain_arguments(folder, **options))
