"""Workers: processes that do one task each, watched from here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastpeft
import fastpeft_kernels
from fastpeft.errors import UserError

from ..progress import Listener
from .settings import Settings

_ROOTS = [str(Path(str(package.__file__)).parents[1]) for package in (fastpeft, fastpeft_kernels)]
_LAST_LINES = 12


class WorkerError(RuntimeError):
    """A worker ended without a result; the message holds the end of its log."""


def run_worker(task: str, settings: Settings, listener: Listener) -> dict[str, Any]:
    """Run `fastpeft.quickstart.worker` and wait for its result.

    Args:
        task: one of the worker's.
        settings: for the worker; its log and result go to the folder `logs` of their output.
        listener: called with each event of the worker's channel.

    Raises:
        UserError: the worker found something in the settings that cannot be.
        WorkerError: it failed.
        KeyboardInterrupt: Ctrl-C; the worker has ended then.
    """
    folder = Path(settings.output) / "logs"
    settings_file, result_file = folder / "settings.json", folder / f"{task}.json"
    settings.save(settings_file)
    command = ["-m", "fastpeft.quickstart.worker", task, str(settings_file), str(result_file)]
    return _run(task, command, result_file, folder / f"{task}.log", settings, listener)


def run_generation(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Run generate.py, which imports nothing of fastpeft; errors as `run_worker`."""
    folder = Path(settings.output) / "logs"
    request_file, result_file = folder / "request.json", folder / "generated.json"
    request_file.write_text(json.dumps(request, indent=2) + "\n")
    # As text, so that neither this folder nor its modules' names are on the path.
    source = Path(__file__).with_name("generate.py").read_text()
    command = ["-c", source, str(request_file), str(result_file)]
    return _run("generate", command, result_file, folder / "generate.log", settings, lambda event: None)


def _run(
    name: str, arguments: Sequence[str], result: Path, log: Path, settings: Settings, listener: Listener
) -> dict[str, Any]:
    result.unlink(missing_ok=True)
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(settings),
        )
        assert process.stdout is not None
        refused = None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "user_error":
                    refused = str(event["message"])
                else:
                    listener(event)
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if refused is not None:
        raise UserError(refused)
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if code != 0 or not result.exists():
        end = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        raise WorkerError("\n".join([f"{name} ended with exit code {code}; the end of {log}:", *end]))
    found = json.loads(result.read_text())
    assert isinstance(found, dict)
    return found


def _environment(settings: Settings) -> dict[str, str]:
    """This process's, with fastpeft found where it was found here, and no network for what is on disk."""
    path = [*dict.fromkeys(_ROOTS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    changed = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",  # the folder that the user happens to be in is nobody's package
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if settings.local_model:
        changed["HF_HUB_OFFLINE"] = "1"
    return {**os.environ, **changed}


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
