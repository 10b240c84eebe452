"""Multi-task fine-tuning: several tasks on one base, a batch's rows of any task in one pass."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from fastpeft.config import FastpeftConfig, LoraSection
from fastpeft.errors import UserError
from fastpeft.memory.plan.predicting import OtherAdapter, Setting
from fastpeft.metrics.findings import Findings
from fastpeft.models.tasks import HEADS
from fastpeft.strategies.base import Strategy
from fastpeft.strategies.figures import Figures
from fastpeft.training.folder import MERGED
from fastpeft.training.preparing import Prepared

from . import alone
from . import merged as merging
from . import options as opts
from .adapters import activate, attach, only, size_head
from .balance import Memory, Weights
from .gradients import Shared, parts_of
from .measured import Measured, measure, of_same_rows
from .options import MultiTaskOptions, sections_of
from .prepared import check_one_head, one_of, prepare_tasks
from .report import conflict_section, prefixed, task_section
from .rows import TaskSampler, by_loss, by_temperature
from .saving import complete
from .trainer import MultiTaskTrainer, Plan


class MultiTask(Strategy):
    """Several tasks' adapters on one base, trained in one forward and one backward a batch."""

    name: ClassVar[str] = "multi-task"
    Options: ClassVar[type] = MultiTaskOptions
    options: MultiTaskOptions

    def __init__(self, config: FastpeftConfig) -> None:
        super().__init__(config)
        self._tasks: dict[str, Prepared] = {}
        self._figures: dict[str, Figures] = {}
        self._sections: dict[str, LoraSection] = {}

    def check(self) -> None:
        opts.check(self.config, self.options)

    def prepare(self, console: Console) -> Prepared:
        self._tasks = prepare_tasks(self.config, sections_of(self.config, self.options), console)
        if self.options.head == "shared":
            check_one_head(self._tasks)
        prepared = one_of(self.config, self._tasks)
        self.config = prepared.config
        return prepared

    def planned(self, setting: Setting) -> Setting:
        options, lora = self.options, self.config.lora
        first, *others = options.tasks
        follows, head_follows = options.adapters == "shared", options.head == "shared"
        return replace(
            setting,
            section=options.section_of(first, lora),
            others=tuple(OtherAdapter(options.rank_of(name, lora), follows, head_follows) for name in others),
        )

    def settle(self, prepared: Prepared, arguments: Any, checkpoint: Path | None, console: Console) -> Any:
        if arguments.world_size > 1:  # each would combine its own gradients before they are added up
            raise UserError(f"strategy.name: multi-task expected one process, got {arguments.world_size}")
        settled = copy.copy(arguments)
        settled.remove_unused_columns = False  # a row's task is no input of the model
        return settled

    def attach(self, base: Any, section: LoraSection, task: str, seed: int) -> Any:
        self._sections = {name: self.options.section_of(name, section) for name in self._tasks}
        model = attach(base, self._sections, task, seed)
        for name, prepared in self._tasks.items():
            size_head(model, name, task, prepared.config.data.labels or [], seed)
        activate(model, list(self._tasks))
        return model

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        from transformers.trainer_callback import PrinterCallback

        options, config, names = self.options, prepared.config, list(self._tasks)
        memory = Memory.of(len(names))
        parts = parts_of(model, names, options.shared_of(config.lora), options.head == "shared")
        plan = Plan(
            adapters=names,
            labels=[len(task.config.data.labels or []) for task in self._tasks.values()],
            weights=Weights(
                [options.weights.get(name, 1.0) for name in names], options.weighting, options.dwa_temperature
            ),
            shared=Shared(parts, options.gradients),
            memory=memory,
            sampler=self._sampler(arguments, memory),
            window=options.window,
            conflict_steps=options.conflict_steps,
            weight_rate=options.weight_rate,
        )
        trainer = MultiTaskTrainer(
            plan,
            task=config.model.task,
            accelerated=config.acceleration.enabled,
            model=model,
            args=arguments,
            train_dataset=prepared.rows.rows,
            eval_dataset=None if prepared.evaluation is None else prepared.evaluation.rows,
            processing_class=prepared.tokenizer,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def before(self, prepared: Prepared, trainer: Any) -> None:
        for name, task in self._tasks.items():
            if task.evaluation is None:
                continue
            self._figures[name] = Figures(task, self.options.generate)
            with only(trainer.model, name):
                self._figures[name].measure_before(task, trainer)

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        model, found = trainer.model, Findings()
        for name, figures in self._figures.items():
            with only(model, name):
                found += prefixed(name, figures.findings(self._tasks[name], trainer))
        sections = [task_section(self._tasks, trainer.plan), conflict_section(trainer.plan)]
        found += Findings(sections=tuple(section for section in sections if section is not None))
        measured = {name: task for name, task in self._tasks.items() if task.evaluation is not None}
        joint: dict[str, Measured] = {}
        if measured and (self.options.alone or self.options.merge is not None):
            for name, task in measured.items():
                with only(model, name):
                    joint[name] = measure(task, trainer)
        if self.options.alone:
            found += self._beside_alone(measured, joint, trainer)
        if self.options.merge is not None:
            found += self._merged(prepared, measured, joint, trainer)
        if trainer.is_world_process_zero():
            for name, task in self._tasks.items():
                folder = Path(trainer.args.output_dir) / name
                folder.mkdir(exist_ok=True)
                complete(folder, task.config, self._sections[name], prepared.tokenizer)
        return found

    def _beside_alone(self, measured: dict[str, Prepared], joint: dict[str, Measured], trainer: Any) -> Findings:
        folder, rows = Path(trainer.args.output_dir), dict(zip(self._tasks, trainer.plan.memory.rows, strict=True))
        finished = {
            name: one
            for name, one in alone.read(folder).items()
            if name in joint and one.wanted == rows[name] and of_same_rows(measured[name], one.measured, joint[name])
        }
        for name, task in measured.items():
            if name not in finished:
                finished[name] = alone.train_alone(trainer, task, self._sections[name], rows[name])
                alone.write(finished, folder)
        return alone.transfer(measured, joint, finished, rows)

    def _merged(
        self, prepared: Prepared, measured: dict[str, Prepared], own: dict[str, Measured], trainer: Any
    ) -> Findings:
        merge, model, names = self.options.merge, trainer.model, list(self._tasks)
        assert merge is not None
        found: dict[str, dict[str, Measured]] = {}
        has_heads = self.config.model.task in HEADS
        for method in merge.methods:
            folder = Path(trainer.args.output_dir) / MERGED / method
            shares = self.options.adapters == "both"
            with merging.merged(model, names, method, merge, shares=shares, seed=trainer.args.seed):
                found[method] = {}
                for name, task in measured.items():
                    with only(model, merging.NAME, name):
                        found[method][name] = measure(task, trainer)
                rank = model.peft_config[merging.NAME].r
                lora = replace(self.config.lora, r=rank, alpha=rank)
                for name in names if has_heads else ():
                    merging.save(model, folder / name, name)
                    complete(folder / name, self._tasks[name].config, lora, prepared.tokenizer)
                if not has_heads:
                    merging.save(model, folder, None)
                    complete(folder, prepared.config, lora, prepared.tokenizer)
        return merging.findings(measured, own, found) if measured else Findings()

    def _sampler(self, arguments: Any, memory: Memory) -> TaskSampler:
        sizes, options = [len(task.rows) for task in self._tasks.values()], self.options
        shares: Any = None
        if options.sampling == "temperature":
            fixed = by_temperature(sizes, options.temperature)
            shares = lambda place: fixed  # noqa: E731
        elif options.sampling == "loss":
            by_size = by_temperature(sizes, 1.0)
            rows = options.window * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
            shares = lambda place: by_loss(memory.windows, place // rows) or by_size  # noqa: E731
        return TaskSampler(sizes, arguments.seed, shares)
