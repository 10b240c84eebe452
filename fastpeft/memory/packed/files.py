"""Files of packed weights: safetensors whose name is the SHA-256 of what they hold, so that any damage shows."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .entries import SUFFIX, UNFINISHED

_DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK = 1 << 20


class Damaged(Exception):
    """A file is not what it was when it was written; the message says how that shows."""


class Packed(NamedTuple):
    """One quantised weight.

    Attributes:
        target: its name in the model.
        source: its name in the checkpoint.
        parts: its tensors, by what follows the weight's name in a state dict: "" for the codes, ".absmax" and so on.
    """

    target: str
    source: str
    parts: Mapping[str, Tensor]


def write(folder: Path, weights: Iterable[Packed]) -> Path:
    """Put weights into a new file. Whoever reads the folder finds all of it or nothing; host memory holds one tensor.

    Raises:
        OSError: it cannot be written. Nothing of it is left.
    """
    weights = list(weights)
    tensors = {one.target + part: tensor for one in weights for part, tensor in one.parts.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    about = {one.target: {"source": one.source, "parts": sorted(one.parts)} for one in weights}
    digest = hashlib.sha256()
    handle, unfinished = tempfile.mkstemp(suffix=UNFINISHED, dir=folder)
    try:
        with open(handle, "wb") as file:
            for name in ("", *names):
                data = _bytes(tensors[name]) if name else _header(tensors, names, about)
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        finished = folder / (digest.hexdigest() + SUFFIX)
        os.replace(unfinished, finished)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return finished


def check(path: Path) -> None:
    """Raise Damaged unless the file holds what its name says. SHA-256 reads about as fast as a disk does."""
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Damaged("not a file")
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != path.stem:
        raise Damaged("its content is not what was written")


def contents(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """(source, names of parts) of each weight in a file, by its name in the model, from the header alone.

    Raises:
        Damaged: the header makes no sense.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["weights"])
            found = {target: (str(one["source"]), tuple(map(str, one["parts"]))) for target, one in about.items()}
            if set(file.keys()) != {target + part for target, (_, parts) in found.items() for part in parts}:
                raise Damaged("other tensors than its header names")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise Damaged(str(error)) from error
    return found


def _header(tensors: Mapping[str, Tensor], names: list[str], about: Mapping[str, Any]) -> memoryview:
    """As the format has it: the length in 8 bytes, then JSON, with spaces up to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"weights": json.dumps(about)}}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().as_subclass(Tensor).cpu().contiguous()
    return memoryview(plain.view(-1).view(torch.uint8).numpy())
