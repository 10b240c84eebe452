"""A language model as a classifier: how likely it takes each class's word to be in the slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpeft.models.devices import pick_device

from .embedding import padded
from .heads import write_settings
from .method import Scores
from .pattern import FREE, Pattern, tokens_of


@dataclass(frozen=True)
class Worded:
    """A classifier.

    Attributes:
        pattern: that texts are put into.
        words: of each class, in their order.
        tokens: of each word; several only where `whole`.
        whole: rank by the mean log-probability of a word's tokens (T-Few), else by the logit of its only one.
        calibrate: subtract what is given for texts that say nothing.
    """

    pattern: Pattern
    words: list[str]
    tokens: list[list[int]]
    whole: bool
    calibrate: bool

    @classmethod
    def made(cls, settings: dict[str, Any], task: str, tokenizer: Any) -> Worded:
        """From what `save` wrote, or the same settings of a run; words are not checked."""
        pattern, whole = Pattern(settings["pattern"], task), settings["whole"]
        tokens = tokens_of(pattern, settings["words"], tokenizer)
        if whole and task == "seq2seq-lm":
            tokens = [[*ids, tokenizer.eos_token_id] for ids in tokens]
        return cls(pattern, settings["words"], tokens, whole, settings["calibrate"])

    def room(self, limit: int) -> int:
        """Tokens that a prompt may have where a row has at most `limit`."""
        return limit - max(map(len, self.tokens)) if self.whole and self.pattern.task == "causal-lm" else limit

    def scores(self, model: Any, tokenizer: Any, rows: Any, batch_size: int) -> Scores:
        found = self._log_probabilities(model, tokenizer, rows, batch_size)
        if self.calibrate:
            free = [tokenizer(self.pattern.prompt(text, text, tokenizer), verbose=False) for text in FREE]
            usual = np.exp(self._log_probabilities(model, tokenizer, free, batch_size)).mean(0)
            found = found - np.log(usual)
        return found

    def save(self, folder: Path, labels: list[str]) -> None:
        settings = {"kind": "worded", "labels": labels, "words": self.words, "pattern": self.pattern.text}
        write_settings(folder, settings | {"whole": self.whole, "calibrate": self.calibrate})

    def class_scores(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> Tensor:
        """(rows, classes) of a padded batch, on the model's device, in float32."""
        if self.whole:
            log_probabilities, mask = answer_log_probabilities(model, tokenizer, batch, self.tokens, self.pattern.task)
            return mean_of(log_probabilities, mask)
        chosen = torch.tensor([ids[0] for ids in self.tokens], device=batch["input_ids"].device)
        return slot_logits(model, tokenizer, batch, self.pattern.task)[:, chosen].float()

    def _log_probabilities(self, model: Any, tokenizer: Any, rows: Any, batch_size: int) -> Scores:
        device, found = pick_device(), []
        for start in range(0, len(rows), batch_size):
            chosen = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
            batch = {name: value.to(device) for name, value in padded(tokenizer, chosen).items()}
            found.append(self.class_scores(model, tokenizer, batch).log_softmax(-1).cpu())
        return torch.cat(found).numpy()


def slot_logits(model: Any, tokenizer: Any, batch: dict[str, Tensor], task: str) -> Tensor:
    """Logits of the vocabulary in the slot, (rows, vocabulary): of the mask, or of what comes next."""
    rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    if task == "masked-lm":
        return model(**batch).logits[rows, (batch["input_ids"] == tokenizer.mask_token_id).int().argmax(-1)]
    if task == "seq2seq-lm":
        start = model.config.decoder_start_token_id
        first = torch.full_like(batch["input_ids"][:, :1], start)
        return model(**batch, decoder_input_ids=first).logits[:, 0]
    return model(**batch).logits[rows, batch["attention_mask"].sum(-1) - 1]


def answer_log_probabilities(
    model: Any, tokenizer: Any, batch: dict[str, Tensor], tokens: Sequence[Sequence[int]], task: str
) -> tuple[Tensor, Tensor]:
    """Of each token of each answer, after each row's prompt.

    Returns:
        (log-probabilities (rows, answers, tokens) in float32, mask (answers, tokens) of the tokens that there are).
    """
    ids = batch["input_ids"]
    rows, count = len(ids), len(tokens)
    longest = max(map(len, tokens))
    mask = torch.tensor([[place < len(one) for place in range(longest)] for one in tokens], device=ids.device)
    padding = [[*one, *[tokenizer.pad_token_id] * (longest - len(one))] for one in tokens]
    answers = torch.tensor(padding, device=ids.device).repeat(rows, 1)  # (rows * answers, tokens)
    if task == "seq2seq-lm":
        hidden = model.get_base_model().get_encoder()(**batch).last_hidden_state.repeat_interleave(count, 0)
        begun = torch.full_like(answers[:, :1], model.config.decoder_start_token_id)
        logits = model(
            encoder_outputs=(hidden,),
            attention_mask=batch["attention_mask"].repeat_interleave(count, 0),
            decoder_input_ids=torch.cat([begun, answers[:, :-1]], 1),
        ).logits
    else:
        lengths = batch["attention_mask"].sum(-1).repeat_interleave(count)
        given = torch.nn.functional.pad(ids.repeat_interleave(count, 0), (0, longest), value=tokenizer.pad_token_id)
        places = lengths[:, None] + torch.arange(longest, device=ids.device)
        given = given.scatter(1, places, answers)
        seen = torch.arange(given.shape[1], device=ids.device) < (lengths + mask.sum(-1).repeat(rows))[:, None]
        logits = model(input_ids=given, attention_mask=seen.long()).logits
        logits = logits.gather(1, (places - 1)[..., None].expand(-1, -1, logits.shape[-1]))
    found = logits.float().log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    return found.reshape(rows, count, longest), mask


def mean_of(log_probabilities: Tensor, mask: Tensor) -> Tensor:
    """(rows, answers): each answer's mean over its tokens."""
    return log_probabilities.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)
