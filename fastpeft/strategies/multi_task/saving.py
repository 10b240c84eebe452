"""What an adapter's folder has beside it, so that it can be used as any run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpeft.config import FastpeftConfig, LoraSection, StrategySection
from fastpeft.training.folder import CONFIG


def complete(folder: Path, config: FastpeftConfig, lora: LoraSection, tokenizer: Any) -> None:
    """The tokenizer, and the configuration that the adapter would have been trained with by itself.

    Args:
        folder: of the adapter.
        config: of its task.
        lora: of the adapter.
        tokenizer: of the run.
    """
    training = replace(config.training, output_dir=str(folder))
    config = replace(config, lora=lora, training=training, strategy=StrategySection())
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    tokenizer.save_pretrained(folder)
