"""A comparison at a tiny size."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from fastpeft.config import FastpeftConfig
from tests.checkpoints import write_rows

QUIET = Console(quiet=True)
STEPS = 4
Configure = Callable[..., FastpeftConfig]


def words(path: Path) -> str:
    """80 rows of which a word tells the class, and 8 twins; returns the path."""
    drawn, others = random.Random(0), ["red", "sky", "coal", "snow", "dog", "tree", "sun", "cat", "sea", "ice"]
    rows = []
    for number in range(80):
        text = [*drawn.choices(others, k=6), "good" if number % 2 else "bad"]
        rows.append({"text": " ".join(text), "label": "ab"[number % 2]})
    return write_rows(path, *rows, *rows[:8])


def configuration(model: str, data: str, folder: Path, *settings: str, **options: Any) -> FastpeftConfig:
    """Two methods, two rates, two seeds, unless the options say otherwise."""
    given = {"methods": ["full", "lora"], "rates": 2, "seeds": 2, "rows": 40, "validation_rows": 12, "test_rows": 16}
    return FastpeftConfig().override(
        [
            f"model.name={model}",
            f"data.path={data}",
            f"training.output_dir={folder}",
            f"training.max_steps={STEPS}",
            "training.per_device_train_batch_size=4",
            "lora.r=2",
            f"strategy.options={json.dumps(given | options)}",
            *settings,
        ]
    )


def out(config: FastpeftConfig) -> Path:
    return Path(config.training.output_dir)
