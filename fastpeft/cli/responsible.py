"""`fastpeft memorization` and `fastpeft groups`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastpeft.config import FastpeftConfig
from fastpeft.data.chat import short
from fastpeft.errors import UserError

from .generate import TrustRemoteCode
from .shared import LAST_SEED, Quiet, Verbose, console, settle_logs

MEMORIZATION_EPILOG = """
Examples:

  fastpeft memorization runs/chat

  fastpeft memorization runs/chat --prefix 64 --tokens 64 --fail-above 0.05
"""
GROUPS_EPILOG = """
Examples:

  fastpeft groups runs/reviews --data test.jsonl --by dialect
"""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of fastpeft train.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def memorization(
    run: Run,
    prefix: Annotated[
        int, typer.Option(min=1, help="Tokens of a training row that the model is given, at least.")
    ] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that it should not know by heart.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="How many rows are tried.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Of the rows drawn.")] = 0,
    fail_above: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Exit with 1 if a larger share is repeated.")
    ] = 1.0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Does a tuned decoder repeat its training text word for word?

    Gives the model the beginnings of its own training rows and compares what it goes on with, beside the base model,
    which tells what the tuning added.
    """
    from fastpeft.generation import end_tokens
    from fastpeft.models import tuned
    from fastpeft.models.devices import pick_device, pick_dtype
    from fastpeft.responsible.memorization import passages, probe
    from fastpeft.training.preparing import prepare

    settle_logs(verbose, quiet)
    shown = console(quiet)
    config = run_config(run, trust_remote_code)
    if config.model.task != "causal-lm":
        raise UserError(f"RUN: expected the run of a decoder, got task {config.model.task}")
    source = tuned.find(str(run), key="RUN", trust_remote_code=trust_remote_code)
    prepared = prepare(config, shown)
    check_rows(run, config, prepared.rows.fingerprint())
    shown.print("loading the model", highlight=False)
    device = pick_device()
    model = tuned.load(source, device, pick_dtype("auto", device))
    ends = end_tokens(model, prepared.tokenizer)
    found = passages(prepared.rows.rows, prefix=prefix, tokens=tokens, most=rows, seed=seed, ends=ends)
    result = probe(model, found, pad_token_id=prepared.tokenizer.pad_token_id)
    print(json.dumps(result.to_dict()) if as_json else result)
    if result.verbatim > fail_above:
        raise typer.Exit(1)


def groups(
    run: Run,
    data: Annotated[str, typer.Option(metavar="FILE_OR_ID", help="Rows with text, label and the group's column.")],
    by: Annotated[str, typer.Option(metavar="COLUMN", help="Column that names each row's group.")],
    split: Annotated[str, typer.Option(help="Which split of the data.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """A tuned classifier's accuracy for each group, where an average hides whom it fails."""
    from fastpeft.data.kinds import LABELLED, rename
    from fastpeft.data.labels import named_labels
    from fastpeft.data.rows import load_rows
    from fastpeft.models import tuned
    from fastpeft.models.devices import pick_device, pick_dtype
    from fastpeft.prediction import classify
    from fastpeft.responsible.groups import by_group

    settle_logs(verbose, quiet)
    config = run_config(run, trust_remote_code)
    if config.model.task != "sequence-classification":
        raise UserError(f"RUN: expected the run of a classifier, got task {config.model.task}")
    if config.data.problem_type not in (None, "single_label_classification"):
        raise UserError(f"RUN: expected a run with one class a row, got {config.data.problem_type}")
    source = tuned.find(str(run), key="RUN", trust_remote_code=trust_remote_code)
    label = config.data.columns.get("label", "label")
    rows = load_rows(data, split=split, key="--data", split_key="--split", label=label)
    rows = rename(rows, config.data.columns)
    for column in (*LABELLED.columns, by):
        if column not in rows.column_names:
            name = "--by" if column == by else "--data"
            raise UserError(f"{name}: expected the column {column}, got {', '.join(rows.column_names)}")
    rows = named_labels(rows)
    labels = config.data.labels or []
    if unknown := sorted({str(label) for label in rows["label"]} - set(labels)):
        raise UserError(f"--data: expected labels of the run, {', '.join(labels)}, got {unknown[0]}")
    texts = words(rows["text"], "text")
    pairs = [None] * len(texts)
    if "text_pair" in rows.column_names:  # which may be null
        words([pair or "" for pair in rows["text_pair"]], "text_pair")
        pairs = rows["text_pair"]
    console(quiet).print("loading the model", highlight=False)
    device = pick_device()
    model = tuned.load(source, device, pick_dtype("auto", device))
    answers = classify(model, tuned.load_tokenizer(source), texts, pairs, batch_size, config.data.max_length)
    guessed = [found[0][0] for found in answers]
    result = by_group([str(name) for name in rows[by]], [str(label) for label in rows["label"]], guessed, by)
    print(json.dumps(result.to_dict()) if as_json else result)


def run_config(run: Path, trust_remote_code: bool) -> FastpeftConfig:
    """The run's configuration as it was resolved, but for its trust in code and the dtype, which is its machine's.

    Raises:
        UserError: there is none.
    """
    path = run.expanduser() / "config.yaml"
    if not path.is_file():
        raise UserError(f"RUN: expected an output folder of fastpeft train, got {run}, which has no config.yaml")
    try:
        config = FastpeftConfig.from_yaml(path)
    except (ValueError, TypeError) as error:
        raise UserError(f"RUN: {path}: {error}") from error
    return replace(config, model=replace(config.model, trust_remote_code=trust_remote_code, dtype="auto"))


def check_rows(run: Path, config: FastpeftConfig, fingerprint: str) -> None:
    """Raise UserError if the run was trained on other rows than are there now."""
    from fastpeft.training.folder import FINGERPRINT

    saved = run.expanduser() / FINGERPRINT
    if saved.is_file() and saved.read_text().strip() != fingerprint:
        raise UserError(f"RUN: expected the rows that it was trained on in {config.data.path}, got others")


def words(values: Iterable[object], column: str) -> list[str]:
    """A column's texts. Raises UserError for a row that has something else."""
    found = list(values)
    for number, value in enumerate(found, 1):
        if not isinstance(value, str):
            raise UserError(f"--data: row {number}, column {column}: expected text, got {short(value)}")
    return found  # type: ignore[return-value]
