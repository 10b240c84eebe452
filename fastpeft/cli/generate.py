"""`fastpeft generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpeft.errors import UserError
from fastpeft.paths import can_be_made

from .shared import LAST_SEED, Dtype, Quantization, Quiet, Verbose, console, settle_logs

if TYPE_CHECKING:
    from fastpeft.generation import Prompt
    from fastpeft.models.tuned import Source

EPILOG = """
Examples:

  fastpeft generate runs/chat --prompt "Tell me about whales."

  fastpeft generate runs/chat --file prompts.jsonl --output answers.jsonl --batch-size 16

  echo "What a film!" | fastpeft generate runs/reviews
"""

TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Base = Annotated[str | None, typer.Option(metavar="ID_OR_DIR", help="Base model, if not the adapter's own.")]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Adapter or whole model: folder or hub ID.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to answer; may come again.")] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts: a line each (.txt), or .jsonl.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON lines there.")] = None,
    system: Annotated[str | None, typer.Option(help="System message of each chat.")] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="Without or with the chat template; by default as in training.",
            show_default=False,
        ),
    ] = None,
    source_language: Annotated[
        str | None, typer.Option(help="Language code of the prompts; by default as in training.", show_default=False)
    ] = None,
    target_language: Annotated[
        str | None, typer.Option(help="Language code of the answers; by default as in training.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest that make up this.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many; 0 for all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 8,
    base: Base = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Storage of the base; by default as in training.", show_default=False),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What is computed with; auto: as fastpeft train.")] = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer prompts with a fine-tuned model; a classifier answers with its classes, a tagger with tags.

    One prompt is answered as it is generated; several, or a file, as JSON lines. Without --prompt and --file the prompt
    is read from standard input.
    """
    from fastpeft.data.languages import set_languages
    from fastpeft.generation import Generator, PromptEncoder, Sampling
    from fastpeft.models import tuned
    from fastpeft.models.devices import pick_device, pick_dtype
    from fastpeft.models.tasks import HEADS
    from fastpeft.strategies.few_shot.using import saved_by

    if output is not None and (not output.parent.is_dir() or output.is_dir() or output == file):
        raise UserError(f"--output: expected a new file in a folder that is there, got {output}")
    if output is not None and not _is_special(output) and not can_be_made(output.parent):
        raise UserError(f"--output: expected a new file in a folder that can be written, got {output}")
    prompts = _prompts(prompt, file)
    settle_logs(verbose, quiet)
    source = tuned.find(model, base=base, trust_remote_code=trust_remote_code)
    few_shot = saved_by(source)
    if few_shot is None and source.task in ("masked-lm", "feature-extraction"):
        raise UserError(f"MODEL: expected a language model or a classifier, got a {_kind(source.task)}: {model}")
    device = pick_device()
    chosen = pick_dtype(dtype.value, device, "--dtype")
    tokenizer = tuned.load_tokenizer(source)
    set_languages(tokenizer, source_language, target_language, ("--source-language", "--target-language"))
    one = len(prompts) == 1 and file is None and output is None
    if few_shot is not None or source.task in HEADS:
        from .heads import checked, plain, predictions

        if system is not None:
            raise UserError(f"--system: expected none for a classifier, got {system!r}")
        prompts = [checked(prompt, source.task) for prompt in prompts]
        loaded = _loaded(source, device, chosen, quantization, quiet)
        make = predictions if few_shot is None else few_shot.predictions
        found = make(source, loaded, tokenizer, prompts, batch_size)
        if one:
            print(plain(next(found)))
            return
        return _write(found, output)
    raw = source.chats is False if raw is None else raw
    encoded = [*map(PromptEncoder(tokenizer, source.config, system=system, raw=raw), prompts)]
    generator = Generator(_loaded(source, device, chosen, quantization, quiet), tokenizer)
    import torch

    torch.manual_seed(seed)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
    if one:
        return generator.stream(encoded[0], sampling, sys.stdout)
    answers = generator.answers(encoded, sampling, batch_size)
    _write(({"prompt": p.given, "completion": a} for p, a in zip(prompts, answers, strict=True)), output)


def _prompts(prompt: list[str] | None, file: Path | None) -> list[Prompt]:
    from fastpeft.generation import Prompt, read_prompts

    if prompt and file:
        raise UserError("--file: expected it without --prompt, got both")
    if file is not None:
        return read_prompts(file)
    if prompt:
        return [Prompt(text) for text in prompt]
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("--prompt: expected a prompt, or --file, or text on standard input, got none")
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise UserError("--prompt: expected text in UTF-8, got something else") from None
    if not text:
        raise UserError("--prompt: expected a prompt, or --file, or text on standard input, got none")
    return [Prompt(text)]


def _loaded(source: Source, device: Any, dtype: Any, quantization: Quantization | None, quiet: bool) -> Any:
    from fastpeft.models import tuned

    console(quiet).print("loading the model", highlight=False)
    return tuned.load(source, device, dtype, None if quantization is None else quantization.value)


def _kind(task: str) -> str:
    return "masked language model" if task == "masked-lm" else "model for embeddings"


def _is_special(output: Path) -> bool:
    """Whether it is there and no plain file: a pipe, or /dev/stdout."""
    return output.exists() and not output.is_file()


def _write(rows: Any, output: Path | None) -> None:
    """JSON lines; a file gets its name when it is whole."""
    if output is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    begun = output if _is_special(output) else output.with_name(f"{output.name}.part")
    if begun != output:
        begun.unlink(missing_ok=True)  # so that no link of somebody else's is followed
    with begun.open("w" if begun == output else "x", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
    if begun != output:
        begun.replace(output)
