"""Rows to token ids and labels, and what was cut or left out on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastpeft.config import DataSection
from fastpeft.errors import UserError

from .chat import IGNORED, ChatEncoder, alike, messages_of, tokens_within, variables_of
from .columns import Row, class_of, list_of, number_of, words_of
from .encoded import Encoded as Encoded
from .encoded import tokens_in
from .kinds import Kind
from .questions import windows
from .tagged import tagged_words


def encode(
    rows: Any,
    kind: Kind,
    task: str,
    tokenizer: Any,
    data: DataSection,
    *,
    document: bool = False,
    where: str = "data",
    seen: Callable[[int], None] = lambda count: None,
) -> Encoded:
    """Encode all rows.

    Args:
        rows: a `datasets.Dataset` with the kind's columns.
        kind: of the columns.
        task: what the model is trained to do.
        tokenizer: of the model, with a chat template where `kind` is a chat.
        data: lengths and labels.
        document: rows are whole texts, to be divided into blocks of max_length rather than cut.
        where: what messages call the data.
        seen: told how many rows are done, a hundred times or after each.

    Raises:
        UserError: a row is not what its column should be (its number is named), or nothing is left to learn.
    """
    limit = data.max_length
    assert limit is not None
    if task == "seq2seq-lm" and kind.name == "text":
        limit -= 1  # an end token comes behind the spans
    options = {"with_indices": True, "remove_columns": rows.column_names}
    if kind.name == "questions":
        with in_temporary_files():
            return _windowed(rows, windows(tokenizer, data), where, limit, seen)
    make = _encoder(kind, task, tokenizer, data)
    learns = _learner(task, tokenizer)
    if document and kind.name == "text":
        divide = _divide_masked(tokenizer, limit, where) if task == "masked-lm" else _divide(make, limit, where)
        with in_temporary_files():
            blocks = rows.map(divide, batched=True, batch_size=1, **options).filter(learns)
            blocks = blocks.add_column("cut", [False] * len(blocks))
        return _counted(blocks, 0, 0, limit, rows)

    every = max(1, len(rows) // 100)

    def one(row: Row, number: int) -> Row:
        if number % every == 0:
            seen(number)
        encoded = make(row, f"{where}: row {number + 1}")
        mark = {"number": number + 1}
        if "cut" in encoded:  # already, where that was to be done
            return encoded | mark
        cut = any(len(values) > limit for values in encoded.values())
        return {name: values[:limit] for name, values in encoded.items()} | {"cut": cut} | mark

    with in_temporary_files():
        examples = rows.map(one, **options)
        learnable = examples.filter(learns)
    dropped = len(examples) - len(learnable)
    return _counted(learnable, sum(examples["cut"]), dropped, limit, rows)


def _windowed(
    rows: Any, make: Callable[[Row, str], list[Row]], where: str, limit: int, seen: Callable[[int], None]
) -> Encoded:
    """Several rows of each; none is cut."""
    every = max(1, len(rows) // 100)

    def several(batch: dict[str, list[Any]], numbers: list[int]) -> Row:
        [number] = numbers
        if number % every == 0:
            seen(number)
        found = make({name: values[0] for name, values in batch.items()}, f"{where}: row {number + 1}")
        columns = {name: [row[name] for row in found] for name in found[0]}
        return columns | {"number": [number + 1] * len(found), "cut": [False] * len(found)}

    options = {"with_indices": True, "remove_columns": rows.column_names}
    return _counted(rows.map(several, batched=True, batch_size=1, **options), 0, 0, limit, rows)


def _counted(marked: Any, cut: int, dropped: int, limit: int, raw: Any) -> Encoded:
    """From rows that still have the columns `cut` and `number`."""
    if len(marked) == 0:
        raise UserError(f"data.max_length: expected rows with something to learn within {limit} tokens, got none")
    rows = marked.remove_columns(["cut", "number"])
    return Encoded(rows, cut, dropped, tokens_in(rows), tuple(marked["cut"]), raw, tuple(marked["number"]))


@contextmanager
def in_temporary_files() -> Iterator[None]:
    """What `datasets` makes of rows goes away with the process; else it would stay beside the user's data."""
    import datasets

    cached = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if cached:
            datasets.enable_caching()


def _learner(task: str, tokenizer: Any) -> Callable[[Row], bool]:
    """Whether a row has something to learn: the loss of nothing is not a number."""
    if task == "causal-lm":
        return lambda row: any(label != IGNORED for label in row["labels"][1:])  # nothing comes before the first
    if task == "seq2seq-lm":
        return lambda row: "labels" in row or len(row["input_ids"]) > 1  # a span to learn, and something beside it
    if task == "masked-lm":
        special = set(tokenizer.all_special_ids)
        return lambda row: any(token not in special for token in row["input_ids"])
    if task == "token-classification":
        return lambda row: any(label != IGNORED for label in row["labels"])
    return lambda row: True


def _encoder(kind: Kind, task: str, tokenizer: Any, data: DataSection) -> Callable[[Row, str], Row]:
    """From a row and how to call it in messages, to ids and labels of any length."""
    if kind.name == "chat":
        chat = ChatEncoder(tokenizer, data.assistant_only)

        def encode_chat(row: Row, where: str) -> Row:
            ids, labels = chat(messages_of(row, where), where, variables_of(row, where))
            return {"input_ids": ids, "labels": labels}

        return encode_chat
    if kind.name == "completion":
        return _source_and_target(tokenizer, data) if task == "seq2seq-lm" else _prompt_and_completion(tokenizer)
    if kind.name == "labelled" and task == "sequence-classification":
        return _labelled(tokenizer, data)
    if kind.name == "tagged":
        return tagged_words(tokenizer, data)
    if task == "seq2seq-lm":
        return _corruptible(tokenizer)
    return _masked(tokenizer, data) if task == "masked-lm" else _text(tokenizer)


def _text(tokenizer: Any) -> Callable[[Row, str], Row]:
    def encode_text(row: Row, where: str) -> Row:
        ids = [*_ids(tokenizer, words_of(row, "text", where)), tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": list(ids)}

    return encode_text


def _masked(tokenizer: Any, data: DataSection) -> Callable[[Row, str], Row]:
    """No labels: which tokens are masked is drawn anew for each batch."""

    def encode_masked(row: Row, where: str) -> Row:
        return _whole_or_cut(tokenizer, data, words_of(row, "text", where))

    return encode_masked


def _corruptible(tokenizer: Any) -> Callable[[Row, str], Row]:
    """No labels, no special tokens: which spans are learned is drawn anew in each epoch."""

    def encode_text(row: Row, where: str) -> Row:
        text = words_of(row, "text", where)
        return {"input_ids": list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])}

    return encode_text


def _prompt_and_completion(tokenizer: Any) -> Callable[[Row, str], Row]:
    """The completion is learned; both may be chats."""
    chat: list[ChatEncoder] = []

    def encode_completion(row: Row, where: str) -> Row:
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            if not chat:
                chat.append(ChatEncoder(tokenizer, assistant_only=True))
            messages = messages_of({"messages": row["prompt"] + row["completion"]}, where)
            variables = variables_of(row, where)
            ids, labels = chat[0](messages, where, variables)
            given = chat[0].prompt(messages[: len(row["prompt"])], where, add_generation_prompt=True, **variables)
            shared = alike(given, ids)
            return {"input_ids": ids, "labels": [IGNORED] * shared + labels[shared:]}
        prompt, completion = (words_of(row, name, where) for name in ("prompt", "completion"))
        # A token that begins in the prompt and ends in the completion is learned: the prompt alone would not have it.
        span = (len(prompt), len(prompt) + len(completion))
        text, options = _without_doubles(tokenizer, prompt + completion)
        ids, learned = tokens_within(tokenizer, text, [span], **options)
        ids = _without_eos(tokenizer, ids)
        labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=False)]
        return {"input_ids": [*ids, tokenizer.eos_token_id], "labels": [*labels, tokenizer.eos_token_id]}

    return encode_completion


def _source_and_target(tokenizer: Any, data: DataSection) -> Callable[[Row, str], Row]:
    def encode_pair(row: Row, where: str) -> Row:
        source = _whole_or_cut(tokenizer, data, words_of(row, "prompt", where))
        target = _whole_or_cut(tokenizer, data, text_target=words_of(row, "completion", where))
        return source | {"labels": target["input_ids"], "cut": source["cut"] or target["cut"]}

    return encode_pair


def _labelled(tokenizer: Any, data: DataSection) -> Callable[[Row, str], Row]:
    """The label is a class's number, a list of 1.0 and 0.0 for several classes, or a number to be learned."""
    numbers = {name: number for number, name in enumerate(data.labels or ())}

    def label_of(row: Row, where: str) -> Any:
        if data.problem_type == "regression":
            return number_of(row, "label", where)
        if data.problem_type == "multi_label_classification":
            names = list_of(row["label"], "label", (str, int), "classes", where)
            those = {class_of(name, numbers, "label", where) for name in names}
            return [float(number in those) for number in range(len(numbers))]
        return class_of(row["label"], numbers, "label", where)

    def encode_labelled(row: Row, where: str) -> Row:
        label = label_of(row, where)
        pair = words_of(row, "text_pair", where) if row.get("text_pair") is not None else None
        return _whole_or_cut(tokenizer, data, words_of(row, "text", where), pair) | {"labels": label}

    return encode_labelled


def _whole_or_cut(tokenizer: Any, data: DataSection, *texts: Any, **options: Any) -> Row:
    """Cut by the tokenizer, which knows where its special tokens belong; `cut` says whether it had to."""
    encoded = tokenizer(*texts, **options, verbose=False)
    cut = len(encoded["input_ids"]) > data.max_length  # type: ignore[operator]
    if cut:
        encoded = tokenizer(*texts, **options, truncation=True, max_length=data.max_length)
    return {name: list(encoded[name]) for name in encoded} | {"cut": cut}


def _divide(
    make: Callable[[Row, str], Row], length: int, where: str
) -> Callable[[dict[str, list[Any]], list[int]], Row]:
    """A last token alone is left out: nothing would come before it."""

    def divide(batch: dict[str, list[Any]], numbers: list[int]) -> Row:
        whole = make({name: values[0] for name, values in batch.items()}, f"{where}: document {numbers[0] + 1}")
        starts = range(0, len(next(iter(whole.values()))) - 1, length)
        blocks = {name: [values[start : start + length] for start in starts] for name, values in whole.items()}
        return blocks | {"number": [numbers[0] + 1] * len(starts)}

    return divide


def _divide_masked(tokenizer: Any, length: int, where: str) -> Callable[[dict[str, list[Any]], list[int]], Row]:
    """Each block gets special tokens of its own."""

    def divide(batch: dict[str, list[Any]], numbers: list[int]) -> Row:
        text = words_of({"text": batch["text"][0]}, "text", f"{where}: document {numbers[0] + 1}")
        blocks = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True, verbose=False)
        found = {name: blocks[name] for name in ("input_ids", "attention_mask")}
        return found | {"number": [numbers[0] + 1] * len(found["input_ids"])}

    return divide


def _ids(tokenizer: Any, text: str) -> list[int]:
    """With the special tokens that the tokenizer adds by itself, but not the one that ends a text."""
    text, options = _without_doubles(tokenizer, text)
    return _without_eos(tokenizer, list(tokenizer(text, verbose=False, **options)["input_ids"]))


def _without_doubles(tokenizer: Any, text: str) -> tuple[str, dict[str, bool]]:
    """The text without what follows its own end token, and options for the tokenizer: no start where it has its own."""
    if tokenizer.eos_token and text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip()
    has_start = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return text, {"add_special_tokens": not has_start}


def _without_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id is not None else ids
