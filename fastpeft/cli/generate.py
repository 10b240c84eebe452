"""`fastpeft generate`."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpeft.errors import UserError

from .shared import Quiet, Verbose, console, settle_logs

if TYPE_CHECKING:
    from fastpeft.models.tuned import Source

EPILOG = """
Examples:

  fastpeft generate runs/chat --prompt "Tell me about whales."

  fastpeft generate runs/chat --file prompts.jsonl --output answers.jsonl --batch-size 16

  echo "What a film!" | fastpeft generate runs/reviews
"""


class Quantization(str, Enum):
    """How the frozen weights are stored."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class Dtype(str, Enum):
    """What is computed with."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest that make up this.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many; 0 for all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
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
    """Answer prompts with a fine-tuned model; a classifier answers with its classes.

    One prompt is answered as it is generated; several, or a file, as JSON lines. Without --prompt and --file the prompt
    is read from standard input.
    """
    from fastpeft.generation import Generator, Sampling, classify, read_prompts
    from fastpeft.models import tuned
    from fastpeft.models.devices import pick_device, pick_dtype

    if output is not None and (not output.parent.is_dir() or output.is_dir() or output == file):
        raise UserError(f"--output: expected a new file in a folder that is there, got {output}")
    prompts = _prompts(prompt, file, read_prompts)
    settle_logs(verbose)
    source = tuned.find(model, base=base, trust_remote_code=trust_remote_code)
    if source.task == "masked-lm":
        raise UserError(f"MODEL: expected a language model or a classifier, got a masked language model: {model}")
    device = pick_device()
    tokenizer = tuned.load_tokenizer(source)
    loaded = _loaded(source, device, pick_dtype(dtype.value, device, "--dtype"), quantization, quiet)
    one = len(prompts) == 1 and file is None and output is None
    if source.task == "sequence-classification":
        if any(not isinstance(text, str) for text in prompts):
            raise UserError("--file: expected texts for a classifier, got messages")
        found = classify(loaded, tokenizer, prompts, batch_size)
        if one:
            print("\n".join(f"{label}\t{probability:.4f}" for label, probability in next(iter(found))))
            return
        rows = ({"text": t, "label": f[0][0], "scores": dict(f)} for t, f in zip(prompts, found, strict=True))
        return _write(rows, output)
    import torch

    torch.manual_seed(seed)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
    generator = Generator(loaded, tokenizer, system=system, raw=source.chats is False if raw is None else raw)
    if one:
        return generator.stream(prompts[0], sampling, sys.stdout)
    answers = generator.answers(prompts, sampling, batch_size)
    _write(({"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)), output)


def _prompts(prompt: list[str] | None, file: Path | None, read: Any) -> list[Any]:
    if prompt and file:
        raise UserError("--file: expected it without --prompt, got both")
    if file is not None:
        return list(read(file))
    if prompt:
        return prompt
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("--prompt: expected a prompt, or --file, or text on standard input, got none")
    text = sys.stdin.read().strip()
    if not text:
        raise UserError("--prompt: expected a prompt, or --file, or text on standard input, got none")
    return [text]


def _loaded(source: Source, device: Any, dtype: Any, quantization: Quantization | None, quiet: bool) -> Any:
    from fastpeft.models import tuned

    console(quiet).print("loading the model", highlight=False)
    return tuned.load(source, device, dtype, None if quantization is None else quantization.value)


def _write(rows: Any, output: Path | None) -> None:
    if output is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    with output.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
