"""What the first batches of a training say of its data: token ids, labels, padding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .notices import Notices

IGNORED = -100
FIRST = 8
"""Batches that are looked at; each is copied to the host."""
RUN = 4
"""Labels at a row's end that are all the padding token: fewer may end a text, as which the same token often serves."""


MORE = 4096
"""Embeddings beyond a tokenizer's tokens, and a tenth of all, that no model is known to be given for a round number."""


FEW = 64
"""Tokens that a tokenizer may have beyond a model's embeddings, if they stand for something else than text."""
MEDIA = re.compile("image|picture|audio|video|vision|speech", re.IGNORECASE)
"""Of a token that stands for something else than text: a model of text alone may have no embedding for it."""
_OF_TEXT = {"input_ids", "labels", "attention_mask", "token_type_ids", "position_ids", "cache_position"}
_OF_TEXT |= {"decoder_input_ids", "decoder_attention_mask", "num_items_in_batch"}


class Batch(NamedTuple):
    """Of one call of the model, on the host: (rows, tokens), None for what it did not get; labels of any shape.

    The last says whether it got tensors of something else than tokens, as pictures are.
    """

    ids: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    media: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What is to be known of a model and its tokenizer.

    Attributes:
        embeddings: for how many tokens; None where that is not known.
        words: for how many tokens the head is; None where it is none over words.
        tags: each token has a class.
        padding: the padding token's id; None where that is not known.
        translates: it is an encoder-decoder, whose labels are no copy of its ids.
    """

    embeddings: int | None
    words: int | None
    tags: bool
    padding: int | None
    translates: bool


def facts_of(model: nn.Module, tokenizer: Any) -> ModelFacts:
    given: Any = model
    base = given.get_base_model() if hasattr(given, "get_base_model") else given
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        padding = getattr(text, "pad_token_id", None)
    return ModelFacts(
        embeddings=_rows(given, "get_input_embeddings"),
        words=_rows(given, "get_output_embeddings"),
        tags="TokenClassification" in type(base).__name__,
        padding=padding if isinstance(padding, int) else None,
        translates=bool(getattr(config, "is_encoder_decoder", False)),
    )


def _rows(model: Any, getter: str) -> int | None:
    """Of a matrix with a row for each token; models without one raise, or have no such method."""
    try:
        weight = getattr(getattr(model, getter)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2
    return weight.shape[0] if plain else None  # type: ignore[union-attr]


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    ids = kwargs.get("input_ids", args[0] if args else None)
    media = any(isinstance(value, Tensor) and name not in _OF_TEXT for name, value in kwargs.items())
    return Batch(_integers(ids), _integers(kwargs.get("labels")), _integers(kwargs.get("attention_mask")), media)


def _integers(value: Any) -> Tensor | None:
    plain = isinstance(value, Tensor) and value.device.type != "meta" and value.numel() > 0
    if not plain or value.is_floating_point() or value.is_complex():
        return None
    found: Tensor = value.detach().cpu()
    return found


class FirstBatches:
    """Looks at batches until there were enough.

    Args:
        facts: of the model.
        notices: to which is added what is found.
    """

    def __init__(self, facts: ModelFacts, notices: Notices) -> None:
        self._facts, self._notices = facts, notices
        self.seen = 0
        self._labelled, self._unlabelled = 0, 0
        self._row: Tensor | None = None
        self._rows, self._same = 0, True
        self._labels: set[int] = set()

    def look(self, batch: Batch) -> None:
        """One more; after the last, `judge`."""
        self.seen += 1
        self._notices.add("vocabulary", outside(batch, self._facts))
        self._notices.add("padding", padding_learned(batch, self._facts))
        if batch.labels is not None:
            learned = bool((batch.labels != IGNORED).any())
            self._labelled, self._unlabelled = self._labelled + learned, self._unlabelled + (not learned)
        self._compare(batch)
        if self.seen == FIRST:
            self.judge()

    @property
    def only_ignored(self) -> bool:
        """Whether there were labels, and none to learn."""
        return bool(self._unlabelled and not self._labelled)

    @property
    def unlabelled(self) -> str:
        """In words, where that is so. It is no fault where the script computes a loss of its own."""
        return (
            f"all labels of the first {self._unlabelled} batches are {IGNORED}, which the loss ignores: nothing is "
            "learned; look at how labels are masked, and whether prompts fill max_length"
        )

    def judge(self) -> None:
        """What can be said of all batches together."""
        if self._same and self._rows > RUN and len(self._labels) > 1:
            self._notices.add(
                "no-input",
                f"all {self._rows} rows of the first {self.seen} batches have the same input_ids, with different "
                "labels: the loss cannot depend on the input; look at which column is tokenized",
            )

    def _compare(self, batch: Batch) -> None:
        """Whether all rows so far are the same but for padding, of text alone, and have a class or number each."""
        ids, labels = batch.ids, batch.labels
        if (
            not self._same
            or batch.media
            or ids is None
            or labels is None
            or ids.dim() != 2
            or labels.shape != ids.shape[:1]
        ):
            self._same = False
            return
        rows = [row if mask is None else row[mask != 0] for row, mask in _with_masks(ids, batch.mask)]
        self._row = rows[0] if self._row is None else self._row
        self._same = all(torch.equal(row, self._row) for row in rows)
        self._rows += len(rows)
        self._labels.update(labels.tolist())


def _with_masks(ids: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    fits = mask is not None and mask.shape == ids.shape
    return list(zip(ids, mask, strict=True)) if fits else [(row, None) for row in ids]  # type: ignore[arg-type]


def outside(batch: Batch, facts: ModelFacts) -> str | None:
    """In words: a token id for which the model has no embedding."""
    for name, ids, rows in (("input_ids", batch.ids, facts.embeddings), ("labels", batch.labels, facts.words)):
        if ids is not None and rows is not None and ids.dim() == 2 and (most := int(ids.max())) >= rows:
            return f"{name}: expected token ids below {rows}, which is how many the model has, got {most}: {_OWN}"
    return None


def padding_learned(batch: Batch, facts: ModelFacts) -> str | None:
    """In words: labels at places that are padding."""
    labels = batch.labels
    if labels is None or labels.dim() != 2:
        return None
    advice = f"give padding the label {IGNORED}"
    mask, beside = batch.mask, batch.ids is not None and batch.ids.shape == labels.shape and not facts.translates
    if beside and mask is not None and mask.shape == labels.shape and (facts.words is not None or facts.tags):
        count = int(((mask == 0) & (labels != IGNORED)).sum())
        if count:
            return (
                f"{count} of the {labels.numel()} labels of a batch are at places that attention_mask hides: {advice}"
            )
    if facts.padding is None or facts.words is None or not (beside or facts.translates):
        return None
    padded = labels == facts.padding if facts.translates else (labels == facts.padding) & (batch.ids == facts.padding)
    runs = padded.flip(1).long().cumprod(1).sum(1)
    rows = int((runs >= RUN).sum())
    if not rows:
        return None
    return f"{rows} of the {len(runs)} rows of a batch learn to write the padding token (id {facts.padding}): {advice}"


def other_tokenizer(facts: ModelFacts, tokenizer: Any) -> str | None:
    """In words: a tokenizer that cannot be the model's.

    Models often have some more embeddings than tokens, which pad the vocabulary to a round number.
    """
    if facts.embeddings is None or not hasattr(tokenizer, "__len__"):
        return None
    tokens, rows = len(tokenizer), facts.embeddings
    if 0 < tokens - rows <= FEW and all(map(MEDIA.search, map(str, _token_names(tokenizer, rows, tokens)))):
        return None
    known = f"the tokenizer has {tokens} tokens, the model embeddings for {rows}"
    if tokens > rows:
        return f"{known}, and a text with one of the others ends the training: {_OWN}"
    return f"{known}: it may be another model's, {_OWN}" if rows - tokens > max(MORE, rows // 10) else None


def _token_names(tokenizer: Any, first: int, end: int) -> list[Any]:
    """The tokens of these numbers; of a tokenizer that tells none of them, one without a name."""
    name = getattr(tokenizer, "convert_ids_to_tokens", None)
    return [None] if name is None else list(name(list(range(first, end))))


_OWN = "take the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
