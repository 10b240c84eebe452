"""All commands together, and what becomes of their errors."""

from __future__ import annotations

import errno
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastpeft.errors import Interrupted, RunFailed, UserError
from fastpeft.printable import printable
from fastpeft.requirements import MissingExtraError

from . import bench, cache, compare, generate, merge, plan, responsible, train, tune, verify
from .config_options import ConfigCommand, with_config_options
from .doctor import doctor
from .quickstart import quickstart
from .shared import complains, unsettle_logs

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

LESS_MEMORY = {
    "train": "--method qlora, --memory.gradient_checkpointing, a smaller --batch-size with more "
    "--gradient-accumulation-steps, or a smaller --max-length",
    "compare": "a smaller --batch-size or a smaller --max-length",
    "generate": "--quantization nf4, a smaller --batch-size, or shorter prompts",
    "verify": "--quantization nf4",
    "tune": "--quantization nf4 or a smaller --tokens",
    "bench": "--quick or --case",
    "memorization": "a smaller --prefix and --tokens",
    "groups": "a smaller --batch-size",
    "quickstart": "a smaller --batch-size or --sequence-length",
}

USERS_PATH = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EROFS}
"""What is wrong with a path that a user named, wherever it is looked at first."""

app = typer.Typer(name="fastpeft", pretty_exceptions_enable=False)


def _add(command: Callable[..., Any], epilog: str = "", cls: type[TyperCommand] | None = None) -> None:
    """A command whose --help breaks the lines of its docstring anew, as the terminal is wide."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(cls=cls, help=text, epilog=epilog)(command)


_add(with_config_options(train.train), train.EPILOG, ConfigCommand)
_add(with_config_options(compare.compare), compare.EPILOG, ConfigCommand)
_add(generate.generate, generate.EPILOG)
_add(merge.merge, merge.EPILOG)
_add(verify.verify, verify.EPILOG)
_add(tune.tune, tune.EPILOG)
_add(plan.plan, plan.EPILOG)
_add(bench.bench, bench.EPILOG)
_add(responsible.memorization, responsible.MEMORIZATION_EPILOG)
_add(responsible.groups, responsible.GROUPS_EPILOG)
_add(cache.cache, cache.EPILOG)
_add(quickstart)
_add(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastpeft import __version__

        print(f"fastpeft {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Parameter-efficient fine-tuning of Transformers, faster and in less memory, with the same numbers."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: what follows `fastpeft`.

    Returns:
        The exit code: 0; 1 when a check failed; 2 for a wrong command line, said in one line on stderr;
        130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        code = app(list(arguments), prog_name="fastpeft", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer's own answer to Ctrl-C
            return _interrupted()
        return code if isinstance(code, int) else 0
    except (UserError, MissingExtraError) as error:
        return _complain(str(error))
    except RunFailed as error:
        _complain(str(error))
        return EXIT_FAILED
    except Interrupted as stopped:
        _complain(str(stopped))
        return 128 + stopped.number
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        names = [kind.__name__ for kind in type(error).__mro__]  # torch's, which is not imported here
        if "OutOfMemoryError" in names:
            less = [f"Less is needed with {LESS_MEMORY[name]}" for name in arguments[:1] if name in LESS_MEMORY]
            message = ". ".join([f"out of GPU memory: {str(error).partition('. ')[0]}", *less])
            _print(message)  # each process has a GPU of its own, so each says it
            if "OutOfMemory" in names:  # ours, with its advice
                print("\n".join(str(error).splitlines()[1:]).strip(), file=sys.stderr)
            return EXIT_FAILED
        # typer's usage errors; their class is click's or typer's own, as the version has it.
        if hasattr(error, "format_message"):
            return _complain(error.format_message())
        if isinstance(error, OSError) and error.filename and error.errno in USERS_PATH:
            return _complain(f"{error.filename}: {error.strerror}")
        raise
    finally:
        unsettle_logs()


def _complain(message: str) -> int:
    if complains():
        _print(message)
    return EXIT_USAGE


def _interrupted() -> int:
    _complain("interrupted")
    return EXIT_INTERRUPTED


def _print(message: str) -> None:
    print(f"fastpeft: {printable(message)}", file=sys.stderr)
