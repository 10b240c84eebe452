"""What a task's folder has beside its adapter, so that it can be used as any run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpeft.config import StrategySection
from fastpeft.training.folder import CONFIG
from fastpeft.training.preparing import Prepared

from .options import MultiTaskOptions


def write_tasks(tasks: dict[str, Prepared], run: Prepared, options: MultiTaskOptions, trainer: Any) -> None:
    """Tokenizer, and the configuration that the task would have by itself, into a folder of each task's name."""
    for name, prepared in tasks.items():
        folder = Path(trainer.args.output_dir) / name
        folder.mkdir(exist_ok=True)
        config = replace(
            prepared.config,
            lora=options.section_of(name, run.config.lora),
            training=replace(run.config.training, output_dir=str(folder)),
            strategy=StrategySection(),
        )
        (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        run.tokenizer.save_pretrained(folder)
