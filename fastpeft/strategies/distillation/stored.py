"""A teacher's largest logits of each token that is learned, in a file: written once, read in every epoch and run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastpeft.data.encoded import Encoded
from fastpeft.errors import UserError
from fastpeft.layers.lazy_logits import plain
from fastpeft_kernels.loss import TopLogits

from .losses import IGNORED

FILE = "teacher.safetensors"
FORMAT = "1"
SAMPLED, EVERY = 1 << 16, 1 << 26
"""Bytes that are hashed of a weight file at each so many of it."""
WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json", "config.json")


class StoredTeacher:
    """Reads what `write` wrote.

    Args:
        path: the file.
        about: what it must be of, as `write` was told.
        rows: the encoded training rows, a `datasets.Dataset`.
        vocabulary: how many words, or classes, the student has.

    Attributes:
        about: all that `write` was told.

    Raises:
        UserError: the file cannot be read, or is of another teacher, other rows or another k.
    """

    def __init__(self, path: Path, about: dict[str, str], rows: Any, vocabulary: int) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                self.about: dict[str, str] = file.metadata() or {}
                check_same(path, self.about, about)
                self._logits, self._words, starts = (file.get_tensor(name) for name in ("logits", "words", "starts"))
            _check_tensors(self._logits, self._words, starts, len(rows), vocabulary)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"strategy.options.stored: {path} cannot be read: {error}; delete it to have it written anew"
            ) from error
        self._starts: list[int] = starts.tolist()
        self._places = {key_of(row): place for place, row in enumerate(_columns(rows))}

    def of(self, examples: list[dict[str, Any]]) -> TopLogits:
        """Of a batch's rows: (counted tokens, k), row after row."""
        places = [self._places[key_of(example)] for example in examples]
        spans = [slice(self._starts[place], self._starts[place + 1]) for place in places]
        logits, words = (torch.cat([values[span] for span in spans]) for values in (self._logits, self._words))
        return TopLogits(logits.float(), words.long())


def write(
    path: Path,
    about: dict[str, str],
    rows: Any,
    k: int,
    vocabulary: int,
    batches: Iterable[dict[str, Any]],
    forward: Callable[[dict[str, Any]], Tensor],
    *,
    shifted: bool,
) -> None:
    """Write the file; a run that is ended meanwhile leaves none.

    Args:
        about: goes into the file's metadata.
        rows, vocabulary: as of `StoredTeacher`; words that the student has not are left out.
        k: how many logits of each token; at most as many as there are words.
        batches: of all rows in their order, with labels.
        forward: the teacher's logits (batch, tokens, words) for a batch.
    """
    from safetensors.torch import save_file

    logits, words, counts = list[Tensor](), list[Tensor](), [0]
    for batch in batches:
        labels = batch["labels"]
        found = plain(forward(batch))[..., :vocabulary]
        for row, wanted in enumerate(labels):
            scores = found[row]
            if wanted.dim() == 0:  # a class
                scores, wanted = scores[None], wanted[None]
            elif shifted:
                scores, wanted = scores[:-1], wanted[1:]
            scores = scores[: len(wanted)][(wanted != IGNORED).to(scores.device)]
            top = scores.float().topk(min(k, scores.shape[-1]), dim=-1)
            logits.append((top.values - top.values[..., :1]).to(torch.float16).cpu())  # the largest is 0
            words.append(top.indices.to(torch.int32).cpu())
            counts.append(len(scores))
    if len(counts) - 1 != len(rows):
        raise RuntimeError(f"expected {len(rows)} rows in the batches, got {len(counts) - 1}")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"logits": torch.cat(logits), "words": torch.cat(words), "starts": torch.tensor(counts).cumsum(0)}
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        part = Path(beside, path.name)
        save_file(tensors, part, {**about, "format": FORMAT})
        os.replace(part, path)


def fingerprints(rows: Encoded, teacher: str, k: int, max_length: int | None) -> dict[str, str]:
    """What a file is of: rows and teacher by their hashes."""
    return {"rows": rows.fingerprint(), "teacher": teacher, "k": str(k), "max_length": str(max_length)}


def check_same(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise UserError if a file's metadata say something else than what is wanted."""
    expected = {
        "format": "this version's format",
        "max_length": f"data.max_length {wanted['max_length']}",
        "rows": "the rows of data.path",
        "teacher": "strategy.options.teacher",
        "k": f"top_k {wanted['k']}",
    }
    for name, text in expected.items():
        if found.get(name) != (wanted | {"format": FORMAT})[name]:
            got = found.get(name, "none") if name in ("k", "max_length") else "another"
            raise UserError(
                f"strategy.options.stored: expected logits of {text}, got {got} in {path}; "
                "name another file, or delete it to have it written anew"
            )


def _check_tensors(logits: Tensor, words: Tensor, starts: Tensor, rows: int, vocabulary: int) -> None:
    """Raise ValueError unless these are what `write` makes of so many rows."""
    shapes = [tuple(one.shape) for one in (logits, words, starts)]
    if logits.dim() != 2 or shapes[0] != shapes[1] or shapes[2] != (rows + 1,):
        raise ValueError(f"expected logits and words (tokens, k) and starts ({rows + 1},), got {shapes}")
    if not logits.is_floating_point() or words.is_floating_point() or starts.is_floating_point():
        raise ValueError(f"expected floating logits, whole words and starts, got {logits.dtype}, {words.dtype}, ...")
    if starts[0] != 0 or starts[-1] != len(logits) or bool((starts.diff() < 0).any()):
        raise ValueError(f"expected starts that ascend from 0 to {len(logits)}")
    if len(words) and not 0 <= int(words.min()) <= int(words.max()) < vocabulary:
        raise ValueError(f"expected words below {vocabulary}, got {int(words.min())} to {int(words.max())}")
    if not bool(logits.isfinite().all()):
        raise ValueError("expected finite logits")


def fingerprint(names: Iterable[str], quantization: str) -> str:
    """SHA-256 of what a teacher is: of local folders the sizes and samples of their files, of hub IDs the commit."""
    digest = hashlib.sha256(quantization.encode())
    for name in names:
        folder = Path(name)
        files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)}) if folder.is_dir() else []
        digest.update(f"{len(files)}".encode() if files else name.encode())
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                for start in range(0, file.stat().st_size, EVERY):
                    opened.seek(start)
                    digest.update(opened.read(SAMPLED))
                opened.seek(max(0, file.stat().st_size - SAMPLED))
                digest.update(opened.read(SAMPLED))
    return digest.hexdigest()


def key_of(row: dict[str, Any]) -> bytes:
    """What tells an encoded row from others; rows that are the same have the same logits."""
    return hashlib.sha256(f"{list(row['input_ids'])} {_plain(row['labels'])}".encode()).digest()


def _columns(rows: Any) -> Iterable[dict[str, Any]]:
    yield from rows.select_columns(["input_ids", "labels"])


def _plain(labels: Any) -> Any:
    return list(labels) if isinstance(labels, (list, tuple)) else int(labels)
