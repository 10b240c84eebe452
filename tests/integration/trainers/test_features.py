"""What transformers' Trainer does beside the steps: evaluation, saving, beginning anew, other kernels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

import fastpeft
from tests.integration.models import make
from tests.integration.reports import notes, siblings
from tests.integration.test_training import flat, trained_values
from tests.integration.trainers.loops import rows, settings
from tests.integration.trainers.runs import check_same_training, losses_of

full = pytest.mark.full


def logged(trainer: Trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


@full
def test_evaluated_and_the_best_taken(tmp_path: Path) -> None:
    """The evaluation loss of each step stands for the training's; the adapters are those of the best step."""

    def hits(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.predictions.shape == prediction.label_ids.shape
        return {"hits": float((prediction.predictions == prediction.label_ids).sum())}

    found = []

    def train(model: Any, folder: Path) -> list[float]:
        given = settings(folder, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
        given |= {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "learning_rate": 0.1}
        data = rows(model)
        trainer = Trainer(
            model,
            TrainingArguments(**given),
            train_dataset=data,
            eval_dataset=data[:5],
            compute_metrics=hits,
            preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        )
        trainer.train()
        found.append((trainer.state.best_global_step, logged(trainer, "eval_hits")))
        assert trainer.predict(data[:3]).predictions.shape == (3, 10)
        return logged(trainer, "eval_loss")

    check_same_training(make(), train, tmp_path)
    assert len(found) == 3 and found[0] == found[1] == found[2]


@full
def test_texts_generated_between_the_steps(tmp_path: Path) -> None:
    """Which change nothing of the training, and are plain PEFT's."""

    class Generate(TrainerCallback):
        def __init__(self) -> None:
            self.texts: list[list[int]] = []

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            model.eval()
            ids = torch.tensor([[5, 6, 7]])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            self.texts.append(made[0].tolist())
            model.train()

    start, found = make(), []
    for accelerated, generating in ((False, True), (True, True), (True, False)):
        model = copy.deepcopy(start)
        if accelerated:
            fastpeft.accelerate(model)
        writer = Generate()
        trainer = Trainer(
            model, TrainingArguments(**settings(tmp_path)), train_dataset=rows(model), callbacks=[writer] * generating
        )
        trainer.train()
        found.append((losses_of(trainer), trained_values(model), writer.texts))
    assert found[0][2] == found[1][2] and len(found[0][2]) == 3
    assert found[1][0] == found[2][0]
    assert all(torch.equal(value, found[2][1][name]) for name, value in found[1][1].items())


class TestModelInit:
    @full
    def test_each_training_begins_anew(self, tmp_path: Path) -> None:
        start, ends = make(), []
        models: list[nn.Module] = []

        def begin() -> Any:
            models.append(fastpeft.accelerate(copy.deepcopy(start)))
            return models[-1]

        trainer = Trainer(model_init=begin, args=TrainingArguments(**settings(tmp_path)), train_dataset=rows(start))
        for _ in range(2):
            trainer.train()
            ends.append(flat(trained_values(trainer.model)))
        assert torch.equal(*ends) and not torch.equal(ends[0], flat(trained_values(start)))
        assert trainer.model is models[-1] and siblings(models[-1]) and not notes(models[-1])

    @full
    def test_search_over_rates(self, tmp_path: Path) -> None:
        optuna = pytest.importorskip("optuna")
        start, best = make(), []
        for accelerated in (False, True):

            def begin(accelerated: bool = accelerated) -> Any:
                model = copy.deepcopy(start)
                return fastpeft.accelerate(model) if accelerated else model

            data = rows(start)
            trainer = Trainer(
                model_init=begin,
                args=TrainingArguments(**settings(tmp_path, eval_strategy="steps", eval_steps=3)),
                train_dataset=data,
                eval_dataset=data,
            )
            found = trainer.hyperparameter_search(
                lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-5, 1e-2])},
                n_trials=3,
                backend="optuna",
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
            best.append(found)
        assert best[0].hyperparameters == best[1].hyperparameters
        assert best[1].objective == pytest.approx(best[0].objective, rel=1e-5)


class TestMemoryRunsOut:
    @pytest.mark.parametrize("retried", [False, pytest.param(True, marks=full)])
    def test_a_smaller_batch_is_found(self, retried: bool, tmp_path: Path) -> None:
        """`auto_find_batch_size` halves the batch, whoever's error tells it that memory ran out."""
        model, sizes = fastpeft.accelerate(make()), []

        def fails(module: nn.Module, args: Any, kwargs: Any) -> None:
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        model.register_forward_pre_hook(fails, with_kwargs=True)
        given = settings(tmp_path, auto_find_batch_size=True) | {"per_device_train_batch_size": 8}
        trainer = Trainer(model, TrainingArguments(**given), train_dataset=rows(model))
        if retried:
            fastpeft.retry_steps(trainer)
        trainer.train()
        assert trainer.state.global_step == 3 and sizes[0] == 8 and set(sizes[-4:]) == {2}
        assert siblings(model) and not notes(model)


@full
def test_only_the_model_saved_and_gone_on_from(tmp_path: Path) -> None:
    peft = make()
    model = fastpeft.accelerate(copy.deepcopy(peft))
    given = settings(tmp_path, save_only_model=True) | {"save_strategy": "steps", "save_steps": 1}
    Trainer(model, TrainingArguments(**given), train_dataset=rows(model)).train()
    again = fastpeft.accelerate(copy.deepcopy(peft))
    trainer = Trainer(again, TrainingArguments(**given | {"max_steps": 5}), train_dataset=rows(again))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5 and siblings(again)
