"""Averages of models, accelerate's preparation and states, several models and threads in one process."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastpeft
from tests.integration.models import batch, make
from tests.integration.quantised import make_quantised
from tests.integration.reports import notes, siblings
from tests.integration.steps import Step, assert_step_close, step, truth
from tests.integration.test_training import flat, trained_values
from tests.integration.trainers.loops import adamw, plain_loop, rows

full = pytest.mark.full


class TestAverages:
    """Copies that follow a model through its training."""

    @pytest.mark.parametrize("when", [pytest.param("before the first step", marks=full), "after it"])
    def test_of_an_accelerated_model(self, when: str) -> None:
        start = make()
        inputs, found = batch(start), []
        for model in (copy.deepcopy(start).double(), copy.deepcopy(start), fastpeft.accelerate(copy.deepcopy(start))):
            if when == "after it":
                step(model, inputs)
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
            optimizer = adamw(model)
            for given in rows(start)[:4]:
                model(**{name: value[None] for name, value in given.items()}).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(model)
            assert not torch.equal(flat(trained_values(average)), flat(trained_values(model)))
            found.append((average, step(average, inputs), step(model, inputs)))
        for kind in (1, 2):  # the average, and the model
            assert_step_close(found[2][kind], found[1][kind], found[0][kind])
        average = found[2][0]
        assert siblings(average) and not notes(average)

    @full
    def test_over_4_bits_by_hand(self) -> None:
        """torch's own would average the packed bytes too."""
        model = fastpeft.accelerate(make_quantised())
        inputs = batch(model)
        step(model, inputs)
        average = copy.deepcopy(model)
        plain_loop(model, Path())
        with torch.no_grad():
            for mine, other in zip(average.parameters(), model.parameters(), strict=True):
                if mine.requires_grad:
                    mine.lerp_(other, 0.5)
        plain = fastpeft.restore(copy.deepcopy(average))
        torch.testing.assert_close(step(average, inputs).loss, step(plain, inputs).loss)


class TestAccelerator:
    @pytest.mark.parametrize("first", ["prepare", "accelerate"])
    def test_prepared_before_or_after(self, first: str) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        plain = make()
        inputs = batch(plain)
        exact = truth(plain, inputs)
        model = copy.deepcopy(plain)
        if first == "accelerate":
            fastpeft.accelerate(model)
        prepared = accelerator.prepare(model)
        if first == "prepare":
            fastpeft.accelerate(prepared)
        peft = step(accelerator.prepare(plain), inputs)
        for _ in range(2):
            assert_step_close(step(prepared, inputs), peft, exact)
        assert siblings(model) and not notes(model)
        assert accelerator.unwrap_model(prepared) is model
        bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert bare is model and siblings(model)

    @full
    def test_state_saved_and_loaded(self, tmp_path: Path) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True)
        model = fastpeft.accelerate(make(lora_dropout=0.1))
        prepared, optimizer = accelerator.prepare(model, adamw(model))
        inputs = batch(model)

        def go_on() -> dict[str, Tensor]:
            for _ in range(2):
                accelerator.backward(prepared(**inputs).loss)
                optimizer.step()
                optimizer.zero_grad()
            return trained_values(model)

        go_on()
        accelerator.save_state(tmp_path)
        whole = go_on()
        accelerator.load_state(tmp_path)
        again = go_on()
        assert all(torch.equal(again[name], value) for name, value in whole.items())


def in_threads(*tasks: Callable[[], Any]) -> list[Any]:
    """All at once; each one's result, or its error."""
    results: list[Any] = [None] * len(tasks)
    together = threading.Barrier(len(tasks))

    def work(index: int) -> None:
        together.wait()
        try:
            results[index] = tasks[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def fit(model: Any, data: list[dict[str, Tensor]], times: int = 3) -> dict[str, Tensor]:
    optimizer = adamw(model)
    for _ in range(times):
        for given in data:
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return trained_values(model)


def write(model: Any, times: int) -> list[list[int]]:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.ones_like(ids)
    model.eval()
    return [
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).flatten().tolist()
        for _ in range(times)
    ]


class TestThreads:
    """Each result is what it is alone, bit for bit."""

    @pytest.mark.parametrize("nf4", [False, pytest.param(True, marks=full)], ids=["dense", "nf4"])
    def test_two_models_trained(self, nf4: bool) -> None:
        starts = [fastpeft.accelerate(make_quantised() if nf4 else make()) for _ in range(2)]
        data = [[batch(start) for _ in range(3)] for start in starts]
        alone = [fit(copy.deepcopy(start), given) for start, given in zip(starts, data, strict=True)]
        found = in_threads(*[lambda i=i: fit(starts[i], data[i]) for i in range(2)])
        for mine, other in zip(found, alone, strict=True):
            assert all(torch.equal(mine[name], value) for name, value in other.items())
        for model in starts:
            assert siblings(model) and not notes(model)

    @full
    def test_one_trained_while_another_writes(self) -> None:
        learner, writer = fastpeft.accelerate(make()), fastpeft.accelerate(make())
        data = [batch(learner) for _ in range(3)]
        alone = fit(copy.deepcopy(learner), data), write(copy.deepcopy(writer), 6)
        found = in_threads(lambda: fit(learner, data), lambda: write(writer, 6))
        assert all(torch.equal(found[0][name], value) for name, value in alone[0].items())
        assert found[1] == alone[1]

    @full
    def test_the_first_steps_of_one_model(self) -> None:
        """Both at once, while it is being learned which projections belong together."""
        start = make()
        trained = [name for name, p in start.named_parameters() if p.requires_grad]
        questions = [batch(start) for _ in range(2)]
        exact = [truth(start, inputs) for inputs in questions]
        peft = [step(start, inputs) for inputs in questions]
        model = fastpeft.accelerate(start)

        def ask(inputs: dict[str, Tensor]) -> Step:
            loss = model(**inputs).loss
            found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            return Step(loss.detach(), dict(zip(trained, found, strict=True)))

        for _ in range(3):
            found = in_threads(*[lambda inputs=inputs: ask(inputs) for inputs in questions])
            for ours, theirs, true in zip(found, peft, exact, strict=True):
                assert_step_close(ours, theirs, true)

    @pytest.mark.parametrize("count", [3, pytest.param(40, marks=full)])
    def test_one_model_asked_by_two(self, count: int) -> None:
        """As a server does. Each thread's numbers are its own, whatever was computed ahead for the other's."""
        model = fastpeft.accelerate(make())
        questions = [batch(model, rows=count) for _ in range(2)]

        def answer(inputs: dict[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return [model(**inputs).loss for _ in range(20)]

        step(model, questions[0])
        alone = [answer(inputs)[0] for inputs in questions]
        found = in_threads(*[lambda inputs=inputs: answer(inputs) for inputs in questions])
        for mine, other in zip(found, alone, strict=True):
            for loss in mine:
                torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
