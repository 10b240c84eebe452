"""`fastpeft train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.hints import nearest

from .shared import Quiet, Verbose, console, settle_logs, speaks

EPILOG = """
Examples:

  fastpeft train run.yaml

  fastpeft train run.yaml --lora.r 8 --learning-rate 1e-4

  fastpeft train --model meta-llama/Llama-3.2-1B --data chats.jsonl --method qlora --output-dir runs/chat

  fastpeft train run.yaml --resume

  torchrun --nproc_per_node 2 --max-restarts 3 -m fastpeft train run.yaml --resume-or-begin

Any key may be shortened to its last part where that is the only one: --r 8 is --lora.r 8.
"""


def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Configuration; options change it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    resume_or_begin: Annotated[
        bool,
        typer.Option("--resume-or-begin", help="The same where there is one, else begin; for torchrun's restarts."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check configuration and data, print what would be run, and stop.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a model with LoRA or QLoRA.

    Data: JSON lines, CSV, Parquet or text, a folder of them, or a data set on the hub, with columns messages (chats),
    prompt and completion, text, or text and label. Decoders are trained by TRL's SFTTrainer, encoders and
    encoder-decoders by transformers' Trainer. The output folder gets the adapter in PEFT's format, config.yaml,
    report.md and loss.png. Ctrl-C and SIGTERM save a checkpoint first.
    """
    shown = console(quiet)
    settled = read_config(config, context.obj or [], resume)
    from fastpeft import serving
    from fastpeft.strategies.run import check_run
    from fastpeft.strategies.run import train as run
    from fastpeft.training.folder import last_checkpoint

    if resume_or_begin and (resume or overwrite):
        raise UserError("--resume-or-begin: expected it without --resume and --overwrite, got both")
    if resume_or_begin:
        resume = last_checkpoint(Path(settled.training.output_dir).expanduser()) is not None
    settle_logs(verbose, quiet)
    if dry_run:
        prepared = check_run(settled, shown, resume=resume, overwrite=overwrite).prepared
        shown.print(f"data: {prepared.rows.summary}", highlight=False, soft_wrap=True)
        print(prepared.config.to_yaml(), end="")
        return
    outcome = run(settled, shown, resume=resume, overwrite=overwrite)
    if not speaks():
        return
    folder = settled.training.output_dir
    print(f"{folder}: {outcome.summary}")
    shown.print(f"report: {folder}/report.md", markup=False, highlight=False, soft_wrap=True)
    if (words := serving.note(Path(folder).expanduser())) is not None:
        shown.print(words, markup=False, highlight=False, soft_wrap=True)


def read_config(path: Path | None, settings: list[str], resume: bool) -> FastpeftConfig:
    """The file's configuration with the options' changes; a run's own where one is resumed and no file is named.

    Raises:
        UserError: no such file, or something in it that cannot be.
    """
    try:
        changed = FastpeftConfig().override(settings)
        if path is None and resume:
            folder = Path(changed.training.output_dir)
            path = folder.expanduser() / "config.yaml"
            if not path.is_file():
                raise UserError(f"--resume: expected a run in training.output_dir, got none in {folder}")
        if path is None:
            return changed
        if not path.is_file():
            raise UserError(f"CONFIG: expected a YAML file, got {path}, which is not there{_near(path)}")
        return FastpeftConfig.from_yaml(path).override(settings)
    except UnicodeDecodeError:
        raise UserError(f"CONFIG: expected text in UTF-8, got something else in {path}") from None
    except OSError as error:
        raise UserError(f"CONFIG: {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _near(path: Path) -> str:
    names = [file.name for file in path.parent.glob("*.y*ml")]
    near = nearest(path.name, names)
    return f"; did you mean {path.with_name(near)}?" if near else ""
