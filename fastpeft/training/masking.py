"""Which tokens are masked, the same in a resumed run as in one without a break."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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


class RepeatableTrainer(Trainer):
    """What is masked is another in each epoch, and the same in each evaluation, so that losses can be compared.

    Attributes:
        evaluation_collator: of the evaluations.
    """

    def __init__(self, collator: Callable[[], Any], **given: Any) -> None:
        """`collator` makes one with an attribute `epoch`, whose draws depend on that and the rows alone."""
        self._training, self.evaluation_collator = collator(), collator()
        given["callbacks"] = [*given["callbacks"], _Epochs(self._training)]
        super().__init__(**given, data_collator=self._training)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self.data_collator = self.evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self._training


class _Epochs(TrainerCallback):
    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._collator.epoch = int(state.epoch or 0)
