"""Masks of masked language models: drawn anew each epoch, and again the same for the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.training.masking import RepeatableMasks
from tests.checkpoints import Checkpoints, wordpieces, write_rows

from .runs import texts, train


def rows(*lines: str) -> list[dict[str, Any]]:
    tokenizer = wordpieces()
    return [dict(tokenizer(line)) for line in lines]


ROWS = rows("the sky is blue and the grass is green", "snow", "coal is black as the night is")


def drawn(collator: RepeatableMasks, batch: list[dict[str, Any]] = ROWS) -> list[list[int]]:
    found: list[list[int]] = collator(batch)["labels"].tolist()
    return found


def test_the_same_rows_get_the_same_masks_whatever_was_drawn_before() -> None:
    collator = RepeatableMasks(wordpieces(), seed=3)
    first = drawn(collator)
    drawn(collator, ROWS[:1])
    torch.rand(5)
    assert drawn(collator) == first == drawn(RepeatableMasks(wordpieces(), seed=3))


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    drawn(RepeatableMasks(wordpieces(), seed=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_epochs_seeds_and_rows_get_others() -> None:
    collators = [RepeatableMasks(wordpieces(), seed=seed) for seed in (3, 3, 4)]
    collators[1].epoch = 1
    found = [drawn(collator) for collator in collators]
    assert found[0] != found[1] and found[0] != found[2] and found[1] != found[2]
    assert drawn(collators[0], [ROWS[0], ROWS[2]])[0] != found[0][0][: len(ROWS[0]["input_ids"])]


def test_15_percent_of_the_words_are_learned_and_no_special_token() -> None:
    batch = rows(*["the sky is blue and the grass is green"] * 200)
    [labels] = [torch.tensor(drawn(RepeatableMasks(wordpieces(), seed=0), batch))]
    assert (labels[:, 0] == -100).all() and (labels[:, -1] == -100).all()
    assert 0.13 < float((labels[:, 1:-1] != -100).float().mean()) < 0.17


def test_a_short_batch_has_something_to_learn() -> None:
    [row] = rows("a")
    for seed in range(20):
        batch = RepeatableMasks(wordpieces(), seed=seed)([row])
        assert batch["labels"].tolist() == [[-100, row["input_ids"][1], -100]]


def test_each_epoch_has_its_own_and_evaluations_share_theirs(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []
    original = RepeatableMasks.torch_call

    def watched(self: RepeatableMasks, examples: list[Any]) -> dict[str, Any]:
        batch = original(self, examples)
        seen.append((self.epoch, str(batch["labels"].tolist())))
        return batch

    monkeypatch.setattr(RepeatableMasks, "torch_call", watched)
    path, held = (write_rows(tmp_path / f"{name}.jsonl", *texts(4)) for name in ("rows", "held"))
    settings = ["--data", path, "--eval-path", held, "--epochs", "3", "--batch-size", "1", "--learning-rate", "0"]
    run = train(tmp_path / "run", "--model", checkpoints["bert"], *settings, "--report-to", "none")
    evaluation = [loss for _, loss in run.record["evaluation"]]
    assert len(evaluation) == 3 and len(set(evaluation)) == 1
    epochs = {epoch: {labels for number, labels in seen if number == epoch} for epoch in (0, 1, 2)}
    assert all(epochs.values()) and not epochs[1] & epochs[2]


def test_a_short_run_of_short_rows_does_not_become_nan(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *[{"text": sign} for sign in "abcdefgh"])
    settings = ["--data", path, "--batch-size", "1", "--logging-steps", "1", "--report-to", "none", "--epochs", "2"]
    run = train(tmp_path / "run", "--model", checkpoints["bert"], "--task", "masked-lm", *settings)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert torch.tensor(run.losses).isfinite().all() and min(run.losses) > 0
