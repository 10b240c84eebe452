"""Masked language models: which tokens are masked, the same in a resumed run as in one without a break."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback


class RepeatableMasks(DataCollatorForLanguageModeling):
    """Draws by seed, epoch and the batch's rows, where transformers' own goes on from a global random state.

    Batches are made ahead of the steps that use them, so no checkpoint holds the state that the next one was made from.

    Attributes:
        epoch: which masks are drawn; others in each.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        super().__init__(tokenizer, mlm=True)
        self.run_seed, self.epoch = seed, 0

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        rows = [list(example["input_ids"]) for example in examples]
        digest = hashlib.sha256(f"{self.run_seed} {self.epoch} {rows}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return super().torch_call(examples)

    def torch_mask_tokens(self, inputs: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """At least one token a batch is learned: the loss of none is not a number."""
        original = inputs.clone()
        inputs, labels = super().torch_mask_tokens(inputs, *others, **options)
        if not (labels != -100).any():
            words = (~torch.isin(original, torch.tensor(self.tokenizer.all_special_ids))).nonzero()
            row, column = words[torch.randint(len(words), (), generator=self.generator)]
            labels[row, column] = original[row, column]
            inputs[row, column] = self.tokenizer.mask_token_id
        return inputs, labels


class MaskingTrainer(Trainer):
    """Evaluates with the same masks each time, so that losses can be compared."""

    def __init__(self, **given: Any) -> None:
        tokenizer, seed = given["processing_class"], given["args"].seed
        self._training, self._evaluation = RepeatableMasks(tokenizer, seed), RepeatableMasks(tokenizer, seed)
        given["callbacks"] = [*given["callbacks"], _EpochsMasks(self._training)]
        super().__init__(**given, data_collator=self._training)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self.data_collator = self._evaluation
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self._training


class _EpochsMasks(TrainerCallback):
    def __init__(self, collator: RepeatableMasks) -> None:
        self._collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._collator.epoch = int(state.epoch or 0)
