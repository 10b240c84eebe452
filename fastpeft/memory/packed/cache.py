"""The packed weights of one checkpoint, kept from one run to the next."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from fastpeft_kernels.common.private import others_may_write, private_folder

from .entries import LOCK, MANIFEST, SUFFIX, UNFINISHED
from .files import Damaged, Packed, check, contents, write

logger = logging.getLogger("fastpeft")

FILE_BYTES = 64 << 20
"""Packed bytes that are gathered for a file. An interrupted run loses no more than one."""
SPARE_BYTES = 1 << 30
"""Left free on the disk, for checkpoints."""
_CHECKERS = 4


class PackedCache:
    """A context. Within it weights are read and added; behind it, unless an error ended it, all of them are kept.

    A second process that finds an entry unfinished waits for the first, and then finds it finished. Whatever is wrong
    with the folder is warned of once; the weights are then packed anew.

    Args:
        folder: of this entry; made if it is not there, for this user alone.
        about: what is in it, for people: JSON.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, dict(about)
        self.sources: dict[str, str] = {}
        """Name in the checkpoint of each weight that is there, by its name in the model."""
        self._places: dict[str, tuple[Path, tuple[str, ...]]] = {}
        self._checks: dict[Path, Future[None]] = {}
        self._open: tuple[Path, Any] | None = None
        self._pending: list[Packed] = []
        self._pending_bytes = 0
        self._written: list[Path] = []
        self._writes = True
        self._stack = ExitStack()

    def __enter__(self) -> PackedCache:
        try:
            self.folder = private_folder(self.folder)
        except OSError as error:
            self._give_up(error)
            return self
        if not self._finished():
            self._lock()
        self._scan()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None and (self._pending or self._written or not self._finished()):
                self._flush()
                self._write_manifest(finished=True)
            if kind is None and self._writes:
                with suppress(OSError):  # when it was last of use, for people who clear some
                    os.utime(self.folder / MANIFEST)
            self._open = None

    def read(self, target: str) -> dict[str, Tensor] | None:
        """The parts of a weight, on the CPU, in memory that the file backs; None where they are not there.

        Of one that was added that is so when its file is full, or all is done.
        """
        from safetensors import SafetensorError, safe_open

        if target not in self._places:
            return None
        path, parts = self._places[target]
        try:
            self._checks[path].result()
            if self._open is None or self._open[0] != path:
                self._open = (path, safe_open(path, framework="pt"))
            return {part: self._open[1].get_tensor(target + part) for part in parts}
        except (Damaged, OSError, SafetensorError, RuntimeError) as error:  # torch's, of a file that is gone
            self._drop(path, error)
            return None

    def add(self, weight: Packed) -> None:
        """Keep a weight, too. It must not change before the next one is added."""
        if not self._writes:
            return
        self._places.pop(weight.target, None)  # what was there did not fit
        self._pending.append(weight)
        self._pending_bytes += sum(part.numel() * part.element_size() for part in weight.parts.values())
        if self._pending_bytes >= FILE_BYTES:
            self._flush()

    def _finished(self) -> bool:
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            return isinstance(found, dict) and found.get("finished") is True
        return False

    def _lock(self) -> None:
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / LOCK)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.warning("another process packs these weights; waiting for it: %s", self.folder)
                lock.acquire()
            self._stack.callback(lock.release)
            for left in self.folder.glob(f"*{UNFINISHED}"):  # of a process that was killed: we hold the lock
                left.unlink(missing_ok=True)
        except (OSError, NotImplementedError) as error:
            self._give_up(error)
        else:
            if not self._finished():
                self._write_manifest(finished=False)

    def _scan(self) -> None:
        checkers = ThreadPoolExecutor(_CHECKERS)
        self._stack.callback(checkers.shutdown, cancel_futures=True)
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                if path.is_symlink():
                    raise Damaged("a link")
                if reason := others_may_write(path):
                    raise Damaged(f"a file {reason}")
                for target, (source, parts) in contents(path).items():
                    self.sources[target] = source
                    self._places[target] = (path, parts)
            except (Damaged, OSError) as error:
                self._drop(path, error)
            else:
                self._checks[path] = checkers.submit(check, path)

    def _drop(self, path: Path, error: Exception) -> None:
        """Forget a file, and take it away."""
        logger.warning("packed weights are made anew, for %s: %s", path, error)
        self._places = {target: place for target, place in self._places.items() if place[0] != path}
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending or not self._writes:
            return
        try:
            if shutil.disk_usage(self.folder).free < self._pending_bytes + SPARE_BYTES:
                raise OSError(f"less than {SPARE_BYTES >> 30} GiB would be left on the disk")
            self._keep(write(self.folder, self._pending))
        except OSError as error:
            self._give_up(error)
        self._pending, self._pending_bytes = [], 0

    def _keep(self, path: Path) -> None:
        """What is pending is in this file now, from where `read` takes it."""
        self._written.append(path)
        self._checks[path] = checked = Future[None]()
        checked.set_result(None)
        self._places |= {weight.target: (path, tuple(weight.parts)) for weight in self._pending}

    def _write_manifest(self, finished: bool) -> None:
        if not self._writes:
            return
        unfinished = self.folder / f"{MANIFEST}.{os.getpid()}{UNFINISHED}"
        try:
            files = {path.name: path.stat().st_size for path in sorted(self.folder.glob(f"*{SUFFIX}"))}
            entry = {**self.about, "finished": finished, "files": files, "written": int(time.time())}
            unfinished.write_text(json.dumps(entry, indent=1), encoding="utf-8")
            os.replace(unfinished, self.folder / MANIFEST)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Keep nothing more, and give the disk back what this run took: the entry will never be whole."""
        logger.warning("packed weights are not kept in %s: %s", self.folder, error)
        self._writes = False
        self._pending = []
        self._places = {target: place for target, place in self._places.items() if place[0] not in self._written}
        for path in self._written:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._written = []
