"""`fastpeft compare` with real trainings: the same batches, failures, every method on every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, Trainer

import fastpeft
from fastpeft.errors import UserError
from fastpeft.strategies.compare import runner, trial
from fastpeft.strategies.compare.methods import METHODS
from fastpeft.strategies.compare.plan import Trial
from fastpeft.strategies.compare.report import report
from fastpeft.strategies.compare.summary import summarise
from fastpeft.training.preparing import prepare
from tests.checkpoints import Checkpoints

from .compared import QUIET, STEPS, Configure, out

pytestmark = pytest.mark.usefixtures("uncollected")


def test_all_methods_see_the_same_batches_and_no_row_that_they_are_judged_by(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    original = Trainer.training_step

    def kept(self: Any, model: Any, inputs: Any, *others: Any) -> Any:
        if self.state.global_step == 0:
            seen.append([])
        seen[-1] += [
            row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return original(self, model, inputs, *others)

    monkeypatch.setattr(Trainer, "training_step", kept)
    found = runner.compare(configure(methods=["full", "lora", "layernorm"], rates=1, seeds=1), QUIET)
    for of_a_seed in (seen[:3], seen[3:]):
        assert len(of_a_seed) == 3 and of_a_seed[0] == of_a_seed[1] == of_a_seed[2]
        assert len(of_a_seed[0]) == 4 * STEPS
    assert seen[0] != seen[3], "another seed, another order"
    held = {tuple(row) for part in (found.splits.validation, found.splits.test) for row in part.rows["input_ids"]}
    assert not held & {tuple(row) for trained in seen for row in trained}
    assert not {tuple(row) for row in found.splits.test.rows["input_ids"]} & {
        tuple(row) for row in found.splits.validation.rows["input_ids"]
    }

    again = trial.run(
        Trial("test", "lora", found.results[-2]["rate"], 1), prepare(configure(), QUIET), found.splits, found.measure
    )
    same = ("figures", "score", "loss", "columns", "trainable")
    assert {name: again[name] for name in same} == {name: found.results[-2][name] for name in same}


def test_a_failing_method_stops_no_other(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(base: Any, setting: Any) -> Any:
        raise ValueError("no such\nlayer")

    monkeypatch.setitem(METHODS, "ia3", METHODS["ia3"].__class__(**{**vars(METHODS["ia3"]), "attach": refuse}))
    found = runner.compare(configure(methods=["ia3", "head"], rates=1, seeds=1), QUIET)
    first, second = summarise(found)
    assert first.failed == "ValueError: no such layer" and first.figures == {}
    assert second.failed is None and second.seeds == 1
    assert "- (IA)³: ValueError: no such layer" in report(found, [first, second])


def test_prefixes_do_not_train_under_activation_checkpointing(configure: Configure, checkpoints: Checkpoints) -> None:
    name = f"model.name={checkpoints['bert-classifier']}"
    prepared = prepare(configure(name, "memory.gradient_checkpointing=true"), QUIET)
    with pytest.raises(UserError, match="gradient_checkpointing: expected false for P-tuning v2, as layers"):
        trial.trainable(METHODS["p-tuning-v2"], prepared, torch.device("cpu"), torch.float32)


def test_a_loss_that_is_no_number_rules_out_a_rate_only(configure: Configure) -> None:
    config = configure("training.max_grad_norm=0", methods=["full"], ranges={"full": [1e-3, 1e30]}, seeds=1)
    found = runner.compare(config, QUIET)
    good, bad, test = found.results
    assert "is no number" in bad["failed"] and good["failed"] is None and test["rate"] == 1e-3


@pytest.mark.full
@pytest.mark.parametrize("model", ["bert-classifier", "llama", "t5"])
def test_every_method_trains_tests_and_loads_again_or_says_why_not(
    configure: Configure, checkpoints: Checkpoints, model: str, tmp_path: Path
) -> None:
    path = checkpoints[model]
    found = runner.compare(configure(f"model.name={path}", methods=[], rates=1, seeds=1, save=True), QUIET)
    rows = {row.method: row for row in summarise(found)}
    failed = {name for name, row in rows.items() if row.failed}
    assert failed == FAILING[model], {name: rows[name].failed for name in failed}
    for one in found.results:
        if one["phase"] == "test" and one["failed"] is None:
            _loads_again(path, out(found.config) / "trained" / f"{one['method']}-1", found, one)


FAILING: dict[str, set[str]] = {  # T5's classifier is two layers, which prompts and prefixes leave untrained
    "bert-classifier": set(),
    "llama": {"prompt", "p-tuning"},  # whose rows are padded in batches
    "t5": {"prompt", "p-tuning", "prefix", "p-tuning-v2"},
}


def _loads_again(path: str, folder: Path, found: Any, result: dict[str, Any]) -> None:
    """What was saved guesses as what was trained did; over a base in 4 bits alone, not."""
    method = METHODS[result["method"]]
    options: dict[str, Any] = {"num_labels": 2}
    if (folder / "adapter_config.json").is_file():
        if method.quantization != "none":
            return
        base = AutoModelForSequenceClassification.from_pretrained(path, **options)
        model: Any = PeftModel.from_pretrained(base, str(folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.eval()
    model.config.pad_token_id = 0
    test = found.splits.test.rows
    rows, labels = test["input_ids"], torch.tensor(test["labels"])
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row]).to(model.device)).logits.cpu() for row in rows])
    assert logits.argmax(-1).tolist() == result["columns"]["guessed"], result["method"]
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert float(loss) == pytest.approx(result["loss"], rel=1e-4), result["method"]


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].quantization == "none"])
def test_acceleration_changes_no_gradient(configure: Configure, checkpoints: Checkpoints, name: str) -> None:
    config = configure(f"model.name={checkpoints['bert-classifier']}")
    prepared = prepare(config, QUIET)
    model = trial.trainable(METHODS[name], prepared, torch.device("cpu"), torch.float32).eval()
    ids = torch.arange(5, 25).view(2, 10)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    fastpeft.restore(model)
    theirs = gradients()
    assert ours.keys() == theirs.keys()
    for path, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[path], rtol=1e-4, atol=1e-6)
