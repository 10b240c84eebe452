"""What is checked and read before a model is loaded: its configuration, its tokenizer, the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from fastpeft.config import DataSection, FastpeftConfig, ModelSection
from fastpeft.data.chat import TEMPLATES, set_template
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.endings import learned_end
from fastpeft.data.kinds import Kind, check_columns, kind_of, rename
from fastpeft.data.labels import resolve_labels
from fastpeft.data.languages import check_target, set_languages
from fastpeft.data.rows import is_document, load_rows, sources
from fastpeft.errors import UserError
from fastpeft.models import bases
from fastpeft.models.adapters import lora_config
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.models.tasks import resolve_task
from fastpeft.paths import absolute
from fastpeft.progress import count

from .memory import Decision
from .spans import sentinels_of


@dataclass(frozen=True)
class Raw:
    """What is read and not encoded yet.

    Attributes:
        rows, evaluation: `datasets.Dataset`s; no evaluation where none was given, or it is still to be held back.
        document: rows are whole texts, divided rather than cut; likewise of `evaluation`.
        task: what the model is trained to do.
        kind: of the columns.
    """

    rows: Any
    evaluation: Any
    document: bool
    evaluation_document: bool
    tokenizer: Any
    data: DataSection
    task: str
    kind: Kind


@dataclass(frozen=True)
class Prepared:
    """All that is checked and loaded before a model is.

    Attributes:
        config: as resolved.
        rows, evaluation: encoded.
        chat_template: what it is called; empty without chats.
        notes: what should be looked at.
        memory: what layers keep, decided once all else is known.
        validation: training rows that a strategy holds back to choose by, so that `evaluation` need not be; None if it
            chooses nothing.
    """

    config: FastpeftConfig
    tokenizer: Any
    rows: Encoded
    evaluation: Encoded | None
    chat_template: str
    notes: list[str]
    memory: Decision = field(default_factory=Decision)
    validation: Encoded | None = None

    @property
    def watched(self) -> Encoded | None:
        """The rows whose loss is looked at during training."""
        return self.evaluation if self.validation is None else self.validation


def prepare(
    config: FastpeftConfig,
    console: Console,
    edit: Callable[[Raw], Raw] = lambda raw: raw,
    read_as: str | None = None,
) -> Prepared:
    """Check model and data against each other, and encode the data.

    Args:
        edit: what is done to the rows before; it may hold an evaluation back, leave out classes, and add to the
            tokenizer.
        read_as: the task whose rows these are, where the model is trained to do another.

    Raises:
        UserError: they cannot be had, do not fit, or cannot be trained on as configured.
    """
    name = bases.checked_name(config.model.name)
    if not config.data.path:
        raise UserError("data.path: expected a file, a folder or a hub ID, got nothing")
    _check_evaluation(config)
    quantization = bases.quantization_of(config)
    model = replace(config.model, name=name, quantization=quantization)  # type: ignore[arg-type]
    hf_config = bases.load_config(model)
    data = replace(config.data, max_length=bases.checked_length(config.data.max_length, hf_config))
    raw = _rows(config, "path")
    kind = kind_of(raw.column_names, read_as or model.task)
    task = resolve_task(model.task, kind, hf_config, config.model.name)
    lora_config(config.lora, task)
    if data.packing and task != "causal-lm":
        raise UserError(f"data.packing: expected false for task {task}, got true")
    tokenizer, template = _tokenizer(model, data, task, kind, _is_chat(raw, kind))
    evaluated = "data.eval_path" if data.eval_path else "data.eval_split"
    raw_evaluation = _rows(config, "eval_path") if data.eval_path or data.eval_split else None
    if raw_evaluation is not None:
        check_columns(raw_evaluation.column_names, kind, evaluated)
        _check_apart(data, evaluated)
    data, raw, raw_evaluation = resolve_labels(read_as or task, data, raw, raw_evaluation)
    documents = is_document(data.path), is_document(data.eval_path or data.path)
    edited = edit(Raw(raw, raw_evaluation, *documents, tokenizer, data, task, kind))
    data = edited.data
    with count(console, "reading the data", len(edited.rows)) as seen:
        rows = encode(edited.rows, kind, read_as or task, tokenizer, data, document=edited.document, seen=seen)
    evaluation = None
    if edited.evaluation is not None:
        document = edited.evaluation_document
        evaluation = encode(
            edited.evaluation, kind, read_as or task, tokenizer, data, document=document, where=evaluated
        )
    elif data.eval_fraction:
        rows, evaluation = rows.divided(data.eval_fraction, config.training.seed, "data.eval_fraction")
    notes = []
    if template:
        token, note = _end_of_answers(rows, tokenizer, data)
        data = replace(data, eos_token=token, chat_template=template)
        notes = [note] if note else []
    dtype = str(pick_dtype(model.dtype, pick_device())).removeprefix("torch.")
    model = replace(model, task=task, dtype=dtype)  # type: ignore[arg-type]
    resolved = replace(config, model=model, data=_with_absolute_paths(data))
    return Prepared(resolved, tokenizer, rows, evaluation, template, notes)


def hold_back(prepared: Prepared, fraction: float) -> Prepared:
    """The same with a share of the training rows, drawn by the seed, as `validation`.

    Raises:
        UserError: no row would be left on either side.
    """
    key = "strategy.options.validation_fraction"
    rows, validation = prepared.rows.divided(fraction, prepared.config.training.seed, key)
    return replace(prepared, rows=rows, validation=validation)


def _check_evaluation(config: FastpeftConfig) -> None:
    data = config.data
    given = [name for name in ("eval_path", "eval_split", "eval_fraction") if getattr(data, name)]
    if "eval_fraction" in given and len(given) > 1:
        raise UserError(f"data.eval_fraction: expected it alone, got data.{given[0]} too")
    if not 0 <= data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction: expected 0 to below 1, got {data.eval_fraction}")
    if data.limit is not None and data.limit < 1:
        raise UserError(f"data.limit: expected at least 1, got {data.limit}")
    if data.stride is not None and data.stride < 0:
        raise UserError(f"data.stride: expected at least 0, got {data.stride}")


def _check_apart(data: DataSection, key: str) -> None:
    """Raise UserError if what is evaluated on is trained on too."""
    if both := sources(data.path, data.split) & sources(data.eval_path or data.path, data.eval_split):
        raise UserError(f"{key}: expected rows that are not trained on, got {min(both)}")


def _rows(config: FastpeftConfig, which: str) -> Any:
    data = config.data
    label = data.columns.get("label", "label")
    if which == "path":
        rows = load_rows(data.path, split=data.split, name=data.name, split_key="data.split", label=label)
    elif data.eval_path:
        split, key = data.eval_split, "data.eval_path"
        rows = load_rows(data.eval_path, split=split, key=key, split_key="data.eval_split", label=label)
    else:
        rows = load_rows(data.path, split=data.eval_split, name=data.name, split_key="data.eval_split", label=label)
    rows = rename(rows, data.columns)
    return rows.select(range(min(data.limit, len(rows)))) if data.limit is not None else rows


def _is_chat(rows: Any, kind: Kind) -> bool:
    return kind.name == "chat" or (kind.name == "completion" and isinstance(rows[0]["prompt"], list))


def _set_end(tokenizer: Any, token: str | None) -> None:
    if token is None:
        return
    if token not in tokenizer.get_vocab():
        raise UserError(f"data.eos_token: expected a token of the tokenizer's vocabulary, got {token!r}")
    tokenizer.eos_token = token


def _end_of_answers(rows: Encoded, tokenizer: Any, data: DataSection) -> tuple[str | None, str | None]:
    """(the token that ends answers if it is not the tokenizer's, a note if it is not learned); sets the tokenizer's."""
    wanted = data.eos_token
    assert data.max_length is not None
    end = learned_end(rows.rows, tokenizer, data.max_length)
    if end.cut:
        return wanted, (
            f"the model does not learn to stop: all rows were cut before the end of an answer; raise data.max_length, "
            f"now {data.max_length}"
        )
    if end.learned is None:
        after = f", {tokenizer.convert_ids_to_tokens(end.unlearned)!r}," if end.unlearned is not None else ""
        return wanted, (
            f"the model does not learn to stop: the chat template does not mark the token that ends an answer{after} "
            "as the assistant's; give data.chat_template one that does, or set data.assistant_only to false"
        )
    token = tokenizer.convert_ids_to_tokens(end.learned)
    if wanted is None and token != tokenizer.eos_token:
        tokenizer.eos_token = wanted = token
    return wanted, None


def _tokenizer(model: ModelSection, data: DataSection, task: str, kind: Kind, chats: bool) -> tuple[Any, str]:
    """The model's tokenizer with all that the configuration says of it, and what its chat template is called."""
    tokenizer = bases.load_tokenizer(model)
    _set_end(tokenizer, data.eos_token)
    set_languages(tokenizer, data.source_language, data.target_language)
    if task == "seq2seq-lm":
        check_target(tokenizer)
        if kind.name == "text":
            sentinels_of(tokenizer)
    if data.chat_template is not None and not chats:
        raise UserError(f"data.chat_template: expected null for data without chats, got {data.chat_template!r}")
    template = set_template(tokenizer, data.chat_template) if chats else ""
    if task == "causal-lm" and tokenizer.eos_token_id is None:
        raise UserError("model.name: expected a tokenizer with an end-of-sequence token, got one without")
    if task in ("token-classification", "question-answering"):
        tokenizer.padding_side = "right"  # places in a row must not depend on its batch
    return tokenizer, template


def _with_absolute_paths(data: Any) -> Any:
    names = ["path", "eval_path", *(["chat_template"] if data.chat_template not in TEMPLATES else [])]
    return replace(data, **{name: absolute(path) for name in names if (path := getattr(data, name))})
