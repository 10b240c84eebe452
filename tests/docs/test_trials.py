"""Tables of the strategies' pages are made of the runs that were recorded."""

from __future__ import annotations

from benchmarks import distillation, few_shot, multi_task, trials


def test_few_shot() -> None:
    assert few_shot.table(few_shot.read()) in few_shot.PAGE.read_text(encoding="utf-8")


def test_distillation() -> None:
    page = distillation.PAGE.read_text(encoding="utf-8")
    assert distillation.table(trials.read(distillation.TRIALS)) in page
    assert distillation.step_table(trials.read(distillation.STEPS)) in page


def test_multi_task() -> None:
    page = multi_task.PAGE.read_text(encoding="utf-8")
    assert multi_task.table(trials.read(multi_task.TRIALS)) in page
    assert multi_task.pass_table(trials.read(multi_task.PASSES)) in page
