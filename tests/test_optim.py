"""`fastpeft.optim.AdamW` against `torch.optim.AdamW(fused=True)`: every bit, whatever happens between two steps."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from fastpeft import optim

SHAPES = ((4, 3), (5, 4), (1,), (3, 0), (130, 7))
ALIKE = 4
"""Steps with the same parameters, of which the last two are taken with kept lists."""


class Pair:
    """The same parameters twice, under PyTorch's optimizer and ours."""

    def __init__(self, *dtypes: torch.dtype, shapes: Any = SHAPES, groups: int = 2, **options: Any) -> None:
        torch.manual_seed(0)
        dtypes = dtypes or (torch.float32,)
        values = [torch.randn(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
        self.theirs, self.ours = ([Parameter(value.clone()) for value in values] for _ in range(2))
        self.their_optimizer: Any = torch.optim.AdamW(grouped(self.theirs, groups), fused=True, **options)
        self.our_optimizer: Any = optim.AdamW(grouped(self.ours, groups), **options)

    @property
    def both(self) -> list[tuple[Any, list[Parameter]]]:
        return [(self.their_optimizer, self.theirs), (self.our_optimizer, self.ours)]

    def set_gradients(self, absent: Any = (), factor: float = 1.0) -> None:
        for i, (theirs, ours) in enumerate(zip(self.theirs, self.ours, strict=True)):
            gradient = None if i in absent else torch.randn_like(theirs) * factor
            theirs.grad, ours.grad = gradient, None if gradient is None else gradient.clone()

    def step(self, absent: Any = ()) -> None:
        self.set_gradients(absent)
        for optimizer, _ in self.both:
            optimizer.step()

    def steps(self, count: int = ALIKE) -> Pair:
        for _ in range(count):
            self.step()
        return self

    def assert_same(self) -> None:
        assert all(map(torch.equal, self.ours, self.theirs))
        theirs, ours = (optimizer.state_dict()["state"] for optimizer in (self.their_optimizer, self.our_optimizer))
        assert ours.keys() == theirs.keys()
        for key, state in theirs.items():
            assert ours[key].keys() == state.keys()
            for name, value in state.items():
                assert ours[key][name].dtype == value.dtype and ours[key][name].shape == value.shape
                assert torch.equal(ours[key][name], value), name


def grouped(parameters: list[Parameter], groups: int) -> list[dict[str, Any]]:
    """With options of their own, as for LoRA+ and biases."""
    return [{"params": parameters[i::groups], "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i in range(groups)]


@pytest.fixture
def torch_steps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each step that was PyTorch's own."""
    taken: list[None] = []
    original = optim._torch_step

    def counted(optimizer: Any) -> Any:
        taken.append(None)
        return original(optimizer)

    monkeypatch.setattr(optim, "_torch_step", counted)
    return taken


runs = st.fixed_dictionaries(
    {
        "dtypes": st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=1, max_size=2),
        "groups": st.integers(1, 3),
        "maximize": st.booleans(),
        "absent": st.lists(st.sets(st.integers(0, len(SHAPES) - 1)), min_size=1, max_size=3),
        "repeats": st.integers(1, 4),
        "change": st.sampled_from(["lr", "weight_decay", "eps"]),
    }
)


def train(
    dtypes: list[torch.dtype], groups: int, maximize: bool, absent: list[set[int]], repeats: int, change: str
) -> None:
    """`repeats` steps for each set of parameters without a gradient; between them an option changes."""
    pair = Pair(*dtypes, groups=groups, maximize=maximize)
    for missing in absent:
        for _ in range(repeats):
            pair.step(missing)
            pair.assert_same()
        for optimizer, _ in pair.both:
            optimizer.param_groups[0][change] *= 0.5


class TestSameNumbers:
    @settings(max_examples=10)
    @given(runs)
    def test_any_groups_dtypes_and_missing_gradients(self, run: dict[str, Any]) -> None:
        train(**run)

    @pytest.mark.full
    @settings(max_examples=300)
    @given(runs)
    def test_many_groups_dtypes_and_missing_gradients(self, run: dict[str, Any]) -> None:
        train(**run)

    def test_lists_are_kept_from_the_third_step_on(self, torch_steps: list[None]) -> None:
        pair = Pair().steps(6)
        assert len(torch_steps) == 2
        pair.assert_same()
        assert not torch.equal(pair.ours[0], Pair().ours[0]), "nothing was trained"

    def test_the_adapter_that_is_not_active_stays_as_it_is(self) -> None:
        pair = Pair()
        for absent in ((), (1, 3), (0, 2, 4)):
            before = [parameter.clone() for parameter in pair.ours]
            for _ in range(ALIKE):
                pair.step(absent)
            for i in absent:
                assert torch.equal(pair.ours[i], before[i])
            pair.assert_same()

    @pytest.mark.parametrize(
        "options",
        [{"amsgrad": True}, {"lr": torch.tensor(0.01)}, {"capturable": True}],
        ids=["amsgrad", "lr", "graphs"],
    )
    def test_what_the_lists_are_not_for_is_torchs(self, options: dict[str, Any], torch_steps: list[None]) -> None:
        if "lr" in options:
            pair = Pair(groups=1)
            for optimizer, _ in pair.both:
                optimizer.param_groups[0]["lr"] = options["lr"].clone()
        else:
            pair = Pair(**options)
        pair.steps().assert_same()
        assert len(torch_steps) == ALIKE

    def test_complex_parameters_are_torchs(self) -> None:
        pair = Pair(torch.complex64, torch.float32)
        for optimizer, _ in pair.both:
            pair.set_gradients()
            with pytest.raises(RuntimeError, match="floating"):
                optimizer.step()

    def test_a_closure_gives_its_loss_and_has_gradients_on(self) -> None:
        parameter = Parameter(torch.ones(2))
        optimizer = optim.AdamW([parameter])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = parameter.square().sum()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(ALIKE)]
        assert losses[0] == 2 and losses == sorted(losses, reverse=True)

    def test_no_parameter_has_a_gradient(self) -> None:
        pair = Pair()
        for _ in range(ALIKE):
            pair.step(range(len(SHAPES)))
        pair.assert_same()


class TestBetweenSteps:
    def test_an_adapter_is_added(self) -> None:
        pair = Pair().steps()
        for optimizer, parameters in pair.both:
            torch.manual_seed(1)
            parameters.append(Parameter(torch.randn(6, 2)))
            optimizer.add_param_group({"params": parameters[-1:], "lr": 0.5})
        pair.steps().assert_same()

    def test_an_adapter_is_deleted(self) -> None:
        pair = Pair(groups=1).steps()
        for optimizer, parameters in pair.both:
            optimizer.state.pop(parameters.pop())
            optimizer.param_groups[0]["params"].pop()
        pair.steps().assert_same()

    def test_groups_are_other_dictionaries(self) -> None:
        pair = Pair().steps()
        for optimizer, _ in pair.both:
            optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}
        pair.steps(1).assert_same()

    def test_a_parameter_moves_to_the_next_group(self) -> None:
        pair = Pair().steps()
        for optimizer, _ in pair.both:
            first, second = optimizer.param_groups
            second["params"].insert(0, first["params"].pop())
        pair.steps(1).assert_same()

    @pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
    def test_state_is_replaced(self, name: str) -> None:
        pair = Pair().steps()
        for optimizer, parameters in pair.both:
            optimizer.state[parameters[1]][name] = optimizer.state[parameters[1]][name] + 1
        pair.steps().assert_same()

    def test_state_is_cleared_before_each_step(self) -> None:
        pair = Pair()
        for _ in range(3):
            for optimizer, _ in pair.both:
                optimizer.state.clear()
            pair.step()
        pair.assert_same()

    def test_state_is_written_in_place(self) -> None:
        pair = Pair().steps()
        for optimizer, parameters in pair.both:
            optimizer.state[parameters[1]]["step"].fill_(100.0)
            optimizer.state[parameters[2]]["exp_avg"].zero_()
        pair.steps(1).assert_same()

    def test_hooks_are_called_once_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[str] = []
        pair = Pair()  # torch puts hooks around its class's step now
        spec = importlib.util.spec_from_file_location("optim_again", optim.__file__)
        assert spec is not None and spec.loader is not None
        again: Any = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, again)
        spec.loader.exec_module(again)
        pair.our_optimizer = again.AdamW(grouped(pair.ours, 2))
        pair.our_optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        pair.our_optimizer.register_step_post_hook(lambda *_: called.append("after"))
        pair.steps().assert_same()
        assert called == ["before", "after"] * ALIKE

    def test_a_schedule(self) -> None:
        pair = Pair()
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8) for optimizer, _ in pair.both]
        for _ in range(ALIKE):
            pair.step()
            for schedule in schedules:
                schedule.step()
        pair.assert_same()


Kind = Callable[..., torch.optim.Optimizer]
KINDS: dict[str, Kind] = {
    "ours": optim.AdamW,
    "fused": lambda *given: torch.optim.AdamW(*given, fused=True),
    "foreach": lambda *given: torch.optim.AdamW(*given, foreach=True),
    "loop": lambda *given: torch.optim.AdamW(*given, foreach=False),
}


class TestStates:
    """A run goes on with the other optimizer, or with the same one."""

    @pytest.mark.parametrize("after", ["ours", "fused"])
    @pytest.mark.parametrize("before", list(KINDS))
    def test_saved_and_loaded(self, before: str, after: str) -> None:
        torch.manual_seed(0)
        start = [torch.randn(shape) for shape in SHAPES]
        gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(2 * ALIKE)]

        def run(*kinds: Kind) -> tuple[list[Parameter], Any]:
            parameters, state = [Parameter(value.clone()) for value in start], None
            half = len(gradients) // 2
            for kind, steps in zip(kinds, (gradients[:half], gradients[half:]), strict=True):
                optimizer = kind(grouped(parameters, 2))
                if state is not None:
                    optimizer.load_state_dict(torch.load(io.BytesIO(state)))
                for each in steps:
                    for parameter, gradient in zip(parameters, each, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                state = file.getvalue()
            return parameters, optimizer.state_dict()["state"]

        found, state = run(KINDS[before], KINDS[after])
        # What loads the state of an optimizer that is not fused goes on as that one does, unless it is ours.
        unfused = before in ("foreach", "loop")
        wanted, wanted_state = run(KINDS[before if unfused else "fused"], KINDS["fused"])
        if unfused and after == "ours":
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        else:
            assert all(map(torch.equal, found, wanted))
        assert [float(each["step"]) for each in state.values()] == [2 * ALIKE] * len(SHAPES)
        assert state.keys() == wanted_state.keys()

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
    )
    def test_copied(self, copied: Callable[[Any], Any]) -> None:
        pair = Pair(groups=1).steps()
        for _, parameters in pair.both:
            for parameter in parameters:
                parameter.grad = None
        pair.their_optimizer, pair.our_optimizer = copied(pair.their_optimizer), copied(pair.our_optimizer)
        kept = [parameter.clone() for parameter in pair.ours]
        old, pair.theirs = pair.ours, pair.their_optimizer.param_groups[0]["params"]
        pair.ours = pair.our_optimizer.param_groups[0]["params"]
        pair.steps().assert_same()
        assert all(map(torch.equal, old, kept)), "the original was trained too"

    def test_counts_of_steps_stay_apart_in_another_optimizer(self) -> None:
        """PyTorch adds to each of them; elements of one tensor must not be one another."""
        pair = Pair().steps()
        pair.their_optimizer.load_state_dict(pair.our_optimizer.state_dict())
        pair.set_gradients(absent=(0,))
        pair.their_optimizer.step()
        counts = [float(pair.their_optimizer.state[p]["step"]) for p in pair.theirs]
        assert counts == [ALIKE, *[ALIKE + 1] * (len(SHAPES) - 1)]


class TestGradientScaler:
    @pytest.mark.parametrize("unscaled", [True, False])
    def test_steps_and_overflows(self, unscaled: bool, torch_steps: list[None]) -> None:
        """Whether gradients were unscaled before, as for clipping, or are by the kernel."""
        pair = Pair()
        scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
        for step in range(6):
            pair.set_gradients(factor=float("inf") if step == 4 else 8.0)
            for scaler, (optimizer, _) in zip(scalers, pair.both, strict=True):
                scaler.scale(torch.ones(()))  # the scaler makes its scale at the first loss
                if unscaled:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            pair.assert_same()
        assert len(torch_steps) == 2
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert float(pair.our_optimizer.state[pair.ours[0]]["step"]) == 5
