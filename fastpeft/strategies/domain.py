"""Domain-adaptive fine-tuning: training goes on with texts of a field, and what it costs elsewhere is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from fastpeft.config import LoraSection
from fastpeft.data.cleaning import Removed, overlaps, repeats, without
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.kinds import TEXT
from fastpeft.data.mixing import Mix, held_back, mixed
from fastpeft.data.rows import is_document, load_rows
from fastpeft.data.vocabulary import grow
from fastpeft.errors import UserError
from fastpeft.metrics.findings import Findings, Metric
from fastpeft.metrics.language import Losses
from fastpeft.models.new_tokens import add_embeddings, trained_embeddings
from fastpeft.paths import absolute
from fastpeft.training.evaluating import token_losses
from fastpeft.training.preparing import Prepared, Raw

from .base import Strategy
from .domain_report import Cleaned, data_section, forgetting_section

WARMUP = 0.05
"""Share of the steps over which the rate rises again, where training.warmup_steps says nothing."""
SAMPLE = 1_000_000
"""Characters of the texts over which is counted how many tokens a larger vocabulary saves."""


@dataclass(frozen=True)
class DomainOptions:
    """Of `strategy.options`.

    Attributes:
        general: file, folder or hub ID of general text: some is held back to measure forgetting on, some replayed.
        replay: general text's share of the training tokens.
        general_held: share of general rows that is held back.
        deduplicate: take out training texts that came before, word for word or nearly.
        near_threshold: how alike texts are that are nearly the same: Jaccard similarity of runs of five words.
        decontaminate: take out training texts that have 13 words in a row with a text that is measured on.
        new_tokens: how many tokens to add to the vocabulary at most, or a file of words, one a line.
        train_embeddings: of new tokens the new rows alone, or embeddings and head whole; the latter where a head has a
            bias, in any case.
        measured_rows: how many rows of either kind losses are measured on at most.
    """

    general: str | None = None
    replay: float = 0.1
    general_held: float = 0.1
    deduplicate: Literal["exact", "near", "none"] = "exact"
    near_threshold: float = 0.8
    decontaminate: bool = True
    new_tokens: int | str = 0
    train_embeddings: Literal["new", "all"] = "new"
    measured_rows: int = 500


class DomainAdaptive(Strategy):
    """Continued pre-training of decoders (next token), encoders (masked tokens) and T5 (corrupted spans)."""

    name: ClassVar[str] = "domain"
    Options: ClassVar[type] = DomainOptions
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm", "masked-lm", "seq2seq-lm")

    def check(self) -> None:
        options = self.options
        for name, low, high in (("replay", 0, 0.99), ("general_held", 0.001, 0.9), ("near_threshold", 0.5, 1)):
            if not low <= (value := getattr(options, name)) <= high:
                raise UserError(f"strategy.options.{name}: expected {low} to {high}, got {value}")
        if options.measured_rows < 1:
            raise UserError(f"strategy.options.measured_rows: expected at least 1, got {options.measured_rows}")
        if isinstance(options.new_tokens, int) and options.new_tokens < 0:
            raise UserError(f"strategy.options.new_tokens: expected at least 0, got {options.new_tokens}")

    def prepare(self, console: Console) -> Prepared:
        self._general: tuple[Any, Any] | None = None
        self._pieces: dict[int, list[int]] = {}
        prepared = super().prepare(console)
        training = prepared.config.training
        self._mix = Mix(prepared.rows, 0, 0, False)
        self._held: Encoded | None = None
        if self._general is not None:
            rest, held = (self._encoded(rows, prepared) for rows in self._general)
            self._held = held
            self._mix = mixed(prepared.rows, rest, self.options.replay, training.seed)
        self.config = replace(
            prepared.config,
            training=replace(training, warmup_steps=training.warmup_steps or WARMUP),
            strategy=replace(prepared.config.strategy, options=_with_absolute_paths(prepared.config.strategy.options)),
        )
        return replace(prepared, config=self.config, rows=self._mix.encoded, notes=[*prepared.notes, *self._notes()])

    def edit(self, raw: Raw) -> Raw:
        if raw.kind is not TEXT:
            raise UserError(
                f"strategy.name: domain expected texts, got columns {raw.kind}; with a model.task of language models a "
                "column text is enough"
            )
        options, seed = self.options, self.config.training.seed
        rows, evaluation = raw.rows.select_columns("text"), raw.evaluation
        cleaned: dict[str, Removed] = {}
        if options.deduplicate != "none":
            seen = repeats(options.deduplicate, options.near_threshold, "strategy.options.deduplicate")
            rows, cleaned["duplicates"] = without(rows, raw.document, seen)
        if raw.data.eval_fraction:
            rows, evaluation = held_back(rows, raw.document, raw.data.eval_fraction, seed, "data.eval_fraction")
        general = self._load_general()
        if options.decontaminate and (evaluation is not None or general is not None):
            measured = [part for part in (evaluation, general and general[1]) if part is not None]
            overlap = overlaps(text for part in measured for text in part["text"] if isinstance(text, str))
            rows, cleaned["overlap"] = without(rows, raw.document, overlap)
            if general is not None:
                left, cleaned["general overlap"] = without(general[0], is_document(options.general), overlap)
                general = left, general[1]
        if len(rows) == 0:
            raise UserError("strategy.options: expected texts to be left after cleaning, got none")
        saved = 0.0
        if options.new_tokens:
            sample = _beginning(rows["text"], SAMPLE)
            before = _tokens(raw.tokenizer, sample)
            self._pieces = grow(raw.tokenizer, rows["text"], self._wanted())
            saved = 1 - _tokens(raw.tokenizer, sample) / before
        self._cleaned = Cleaned(cleaned, len(self._pieces), saved)
        self._general = general
        return replace(raw, rows=rows, evaluation=evaluation)

    def change(self, base: Any, section: LoraSection) -> LoraSection:
        if not self._pieces:
            return section
        add_embeddings(base, self._pieces)
        return trained_embeddings(base, section, sorted(self._pieces), self.options.train_embeddings == "all")

    def before(self, prepared: Prepared, trainer: Any) -> None:
        self._before = self._measured(prepared, trainer)

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        after = self._measured(prepared, trainer)
        sections = [forgetting_section(self._before, after, self._mix), data_section(self._cleaned)]
        metrics = [self._metric(name, now) for name, now in after.items()]
        if "general" in after:
            change = after["general"].since(self._before["general"])
            metrics.append(Metric("forgetting, nats a token", *change, len(after["general"]), better="lower"))
        return Findings(tuple(metrics), (), tuple(section for section in sections if section is not None))

    def _metric(self, name: str, now: Losses) -> Metric:
        """Perplexity is a decoder's; what is masked is guessed from both sides, so that its loss stands for itself."""
        perplexity = self.config.model.task == "causal-lm"
        value, old = (found.perplexity() if perplexity else found.loss() for found in (now, self._before[name]))
        named = f"{'perplexity' if perplexity else 'nats a masked token'}, {name}"
        if name == "general":
            return Metric(named, *value, len(now), better="lower")
        return Metric(named, *value, len(now), old.value, "before training", "lower")

    def _measured(self, prepared: Prepared, trainer: Any) -> dict[str, Losses]:
        """Losses of held-out text by its kind; the same rows, and masks, each time."""
        import numpy as np

        found = {}
        for name, held in (("domain", prepared.evaluation), ("general", self._held)):
            if held is not None:
                drawn = np.random.default_rng(0).permutation(len(held))[: self.options.measured_rows]
                found[name] = token_losses(prepared, trainer, held.part(drawn.tolist()))
        return found

    def _load_general(self) -> tuple[Any, Any] | None:
        """(texts that may be replayed, texts held back)."""
        options, key = self.options, "strategy.options.general"
        if options.general is None:
            return None
        rows = load_rows(options.general, split=None, key=key)
        if "text" not in rows.column_names:
            raise UserError(f"{key}: expected a column text, got {', '.join(rows.column_names)}")
        rows, document = rows.select_columns("text"), is_document(options.general)
        return held_back(rows, document, options.general_held, self.config.training.seed, key)

    def _encoded(self, rows: Any, prepared: Prepared) -> Encoded:
        config, key = prepared.config, "strategy.options.general"
        document = is_document(str(self.options.general))
        return encode(rows, TEXT, config.model.task, prepared.tokenizer, config.data, document=document, where=key)

    def _wanted(self) -> int | list[str]:
        given = self.options.new_tokens
        if isinstance(given, int):
            return given
        try:
            words = [line.strip() for line in Path(given).expanduser().read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"strategy.options.new_tokens: expected a number or a file of words, got {given}, which cannot be read"
            ) from error
        return [word for word in words if word]

    def _notes(self) -> list[str]:
        notes = []
        if self._mix.fell_short and self.options.replay:
            notes.append(
                f"general text is {self._mix.share:.1%} of the training tokens, not strategy.options.replay "
                f"{self.options.replay:.1%}: there is no more of it"
            )
        if self.options.general is None:
            notes.append("forgetting is not measured: strategy.options.general names no general text")
        return notes


def _with_absolute_paths(options: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in ("general", "new_tokens") if isinstance(options.get(name), str)]
    return options | {name: absolute(options[name]) for name in names}


def _beginning(texts: Iterable[Any], characters: int) -> list[str]:
    """Of all texts together: a document may be longer than is good to hold."""
    found: list[str] = []
    for text in texts:
        if isinstance(text, str):
            found.append(text[:characters])
            characters -= len(found[-1])
        if characters <= 0:
            break
    return found


def _tokens(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"])
