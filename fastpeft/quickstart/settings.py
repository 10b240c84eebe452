"""What a quickstart runs with, checked as far as that goes without loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastpeft.errors import UserError
from fastpeft.models.bases import checked_name
from fastpeft.structured import build

ASSETS = Path(__file__).parent / "assets"
LEAST = {"steps": 2, "batch_size": 1, "sequence_length": 8, "rank": 1, "seed": 0}
"""What numbers must be; the first step is not timed, hence two."""


@dataclass(frozen=True)
class Settings:
    """Attributes: as the options of `fastpeft quickstart`; texts are files, `model` a folder or a hub ID."""

    model: str
    text: str
    held_out: str
    steps: int
    batch_size: int
    sequence_length: int
    rank: int
    learning_rate: float
    quantization: Literal["nf4", "none"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    seed: int
    output: str

    @property
    def shipped_model(self) -> bool:
        return Path(self.model) == ASSETS / "model"

    @property
    def shipped_text(self) -> bool:
        return Path(self.text) == ASSETS / "text" / "train.txt"

    @property
    def local_model(self) -> bool:
        return Path(self.model).is_dir()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Settings:
        return build(cls, json.loads(path.read_text()))


def checked_settings(
    *, model: str | None, text: Path | None, held_out: Path | None, output: Path, learning_rate: float, **others: Any
) -> Settings:
    """Settings from the command's options; None stands for what is shipped.

    Raises:
        UserError: no such model folder or text, an empty text, one text without the other, a number too small, or a
            file in output's way.
    """
    if (text is None) != (held_out is None):
        given, missing = ("--held-out", "--text") if text is None else ("--text", "--held-out")
        raise UserError(f"{missing}: expected a file, because {given} was given, got none")
    for name, least in LEAST.items():
        if others[name] < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {others[name]}")
    if not learning_rate > 0:
        raise UserError(f"--learning-rate: expected more than 0, got {learning_rate}")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: expected a folder or a new name, got a file: {output}")
    return Settings(
        model=checked_name(str(ASSETS / "model") if model is None else model, "--model"),
        text=_checked_text("--text", text or ASSETS / "text" / "train.txt"),
        held_out=_checked_text("--held-out", held_out or ASSETS / "text" / "held_out.txt"),
        output=str(output),
        learning_rate=learning_rate,
        **others,
    )


def _checked_text(option: str, path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{option}: expected a text file, got {path}, which is not there")
    try:
        empty = not path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{option}: expected text in UTF-8, got something else in {path}") from None
    if empty:
        raise UserError(f"{option}: expected some text, got an empty file: {path}")
    return str(path.resolve())
