"""Texts in a pattern with a slot, and the words that stand for classes there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.errors import UserError

SLOT = re.compile(r"\{(\w*)\}")
KEY, WORDS_KEY = "strategy.options.pattern", "strategy.options.verbaliser"
FREE = ("N/A", "...", "text")
"""Texts that say nothing: Zhao et al. 2021 (arXiv 2102.09690) average over such."""


@dataclass(frozen=True)
class Pattern:
    """A pattern for a model.

    Attributes:
        text: with the slots {text} and {answer}, and {text_pair} where rows have a second text.
        task: of the model: a masked one sees the whole pattern, others what comes before the answer.
    """

    text: str
    task: str

    def check(self) -> None:
        """Raises UserError for a pattern without its slots, or that the model could not read."""
        slots = SLOT.findall(self.text)
        for name in ("text", "answer"):
            if slots.count(name) != 1:
                raise UserError(f"{KEY}: expected the slot {{{name}}} once, got {self.text!r}")
        if unknown := [name for name in slots if name not in ("text", "text_pair", "answer")]:
            raise UserError(f"{KEY}: expected slots {{text}}, {{text_pair}} and {{answer}}, got {{{unknown[0]}}}")
        if self.task != "masked-lm" and slots[-1] != "answer":
            raise UserError(
                f"{KEY}: expected {{answer}} as the last slot for task {self.task}, which reads from left to right, "
                f"got {self.text!r}"
            )

    def filled(self, text: str, pair: str | None, answer: str) -> str:
        """The whole pattern."""
        values = {"text": text, "text_pair": pair or "", "answer": answer}
        return SLOT.sub(lambda found: values[found[1]], self.text)

    def prompt(self, text: str, pair: str | None, tokenizer: Any) -> str:
        """What the model reads: with a mask in the slot, or up to the slot."""
        if self.task == "masked-lm":
            texts = [None if one is None else one.replace(tokenizer.mask_token, " ") for one in (text, pair)]
            return self.filled(texts[0] or "", texts[1], tokenizer.mask_token)
        return self._before(text, pair).rstrip()

    def shown(self, text: str, pair: str | None, answer: str) -> str:
        """With its answer, for those that learn from the prompt."""
        return self.filled(text, pair, answer)

    def _before(self, text: str, pair: str | None) -> str:
        before = Pattern(self.text[: self.text.index("{answer}")], self.task)
        return before.filled(text, pair, "")

    def gap(self) -> str:
        """What stands between prompt and answer."""
        before = self._before("x", "x")
        return before[len(before.rstrip()) :]

    @property
    def pairs(self) -> bool:
        """Whether it has a slot for a second text."""
        return "{text_pair}" in self.text

    def fit(self, text: str, pair: str | None, tokenizer: Any, limit: int) -> str:
        """The prompt with so much of the texts, the longer one cut first, that it has at most `limit` tokens.

        Raises:
            UserError: the rest of the pattern leaves no room for them.
        """
        prompt = self.prompt(text, pair, tokenizer)
        while (over := len(_ids(tokenizer, prompt)) - limit) > 0:
            sizes = [len(ends_of(text, tokenizer)), len(ends_of(pair or "", tokenizer)) if self.pairs else 0]
            short, long = sorted(sizes)
            if long <= 1:
                raise UserError(f"data.max_length: expected more than the pattern's own tokens, got {limit}")
            kept = max(long - over, min(short, long - 1), 1)
            if sizes[0] == long:
                text = cut(text, kept, tokenizer)
            else:
                pair = cut(pair or "", kept, tokenizer)
            prompt = self.prompt(text, pair, tokenizer)
        return prompt


def ends_of(text: str, tokenizer: Any) -> list[int]:
    """Where each token of a text ends in it."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [end for _, end in found]


def cut(text: str, count: int, tokenizer: Any) -> str:
    """The first `count` tokens of a text."""
    ends = ends_of(text, tokenizer)
    return text if len(ends) <= count else text[: ends[count - 1]]


def tokens_of(pattern: Pattern, words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens that each word has in the pattern's slot."""
    prompt = _ids(tokenizer, pattern.prompt("x", "x", tokenizer))
    if pattern.task == "seq2seq-lm":
        special = set(tokenizer.all_special_ids)
        targets = [tokenizer(text_target=word, verbose=False)["input_ids"] for word in words]
        return [[token for token in target if token not in special] for target in targets]
    found = []
    for word in words:
        if pattern.task == "masked-lm":
            place = prompt.index(tokenizer.mask_token_id)
            whole = _ids(tokenizer, pattern.filled("x", "x", word))
            behind = len(prompt) - place - 1
        else:
            place, behind = len(prompt), 0
            whole = _ids(tokenizer, pattern.prompt("x", "x", tokenizer) + pattern.gap() + word)
        end = len(whole) - behind
        if whole[:place] != prompt[:place] or whole[end:] != prompt[len(prompt) - behind :]:
            raise UserError(
                f"{WORDS_KEY}: expected words that leave the pattern's other tokens as they are, got {word!r} in "
                f"{pattern.text!r}; put spaces around {{answer}}"
            )
        found.append(whole[place:end])
    return found


def words_of(labels: Sequence[str], verbaliser: dict[str, str] | None) -> list[str]:
    """The word of each class. Raises UserError unless each has one, and no other does."""
    if verbaliser is None:
        return list(labels)
    if unknown := [name for name in verbaliser if name not in labels]:
        raise UserError(f"{WORDS_KEY}: expected classes of {', '.join(labels)}, got {unknown[0]!r}")
    if missing := [label for label in labels if label not in verbaliser]:
        raise UserError(f"{WORDS_KEY}: expected a word for each class, got none for {missing[0]!r}")
    return [verbaliser[label] for label in labels]


def check_words(labels: Sequence[str], words: Sequence[str], tokens: Sequence[Sequence[int]], *, single: bool) -> None:
    """Raises UserError for words of no token, of several where one is wanted, and for two that are the same."""
    for word, ids in zip(words, tokens, strict=True):
        if not ids or (single and len(ids) > 1):
            wanted = "one token" if single else "at least one token"
            hint = "; strategy.options.method t-few takes several" if ids else ""
            raise UserError(f"{WORDS_KEY}: expected words of {wanted} in the pattern, got {word!r} of {len(ids)}{hint}")
    taken: dict[tuple[int, ...], str] = {}
    for label, word, ids in zip(labels, words, tokens, strict=True):
        if (other := taken.setdefault(tuple(ids), label)) != label:
            raise UserError(
                f"{WORDS_KEY}: expected another word for each class, got the same tokens for {other!r} and {label!r}: "
                f"{word!r}"
            )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])
