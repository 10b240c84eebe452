"""The parts of multi-task training: shared copies, surgery, weights, samplers, heads; each against what defines it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

import fastpeft
from fastpeft.config import LoraSection
from fastpeft.errors import UserError
from fastpeft.strategies.multi_task import alone
from fastpeft.strategies.multi_task.adapters import activate, attach, only, size_head
from fastpeft.strategies.multi_task.balance import Memory, Weights
from fastpeft.strategies.multi_task.gradients import Part, Shared, cosines, parts_of
from fastpeft.strategies.multi_task.options import SOLVERS
from fastpeft.strategies.multi_task.rows import TaskSampler, by_loss, by_temperature
from fastpeft.strategies.multi_task.trainer import MultiTaskTrainer, Plan, token_losses

LABELS = {"one": ["a", "b"], "two": ["c", "d", "e"]}
SECTION = LoraSection(r=2, target_modules=["query", "value"])


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=2, **sizes)
    return BertForSequenceClassification(config).eval()


def model_of(*, head: bool = False, rank: int = 2) -> tuple[Any, Shared]:
    """Two tasks' adapters with values of their own, of which the first ranks are shared."""
    model = attach(bert(), {name: SECTION for name in LABELS}, "sequence-classification", 0)
    for name, labels in LABELS.items():
        size_head(model, name, "sequence-classification", ["x"] * 2 if head else labels, 0)
    activate(model, list(LABELS))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model, Shared(parts_of(model, list(LABELS), rank, head))


IDS = torch.arange(24).reshape(4, 6)
NAMES = ["one", "two", "two", "one"]


def losses(model: Any) -> torch.Tensor:
    with fastpeft.mixed_batch(model, NAMES):
        logits = model(input_ids=IDS).logits
    assert logits.shape == (4, 3), "as wide as the widest head"
    found = [
        functional.cross_entropy(logits[row : row + 1, : len(LABELS[name])], torch.tensor([1]))
        for row, name in enumerate(NAMES)
    ]
    return torch.stack(found)


def test_a_row_of_a_mixed_batch_is_what_its_adapter_alone_gives() -> None:
    model, _ = model_of(rank=0)
    with torch.no_grad(), fastpeft.mixed_batch(model, NAMES):
        mixed = model(input_ids=IDS).logits
    for row, name in enumerate(NAMES):
        with torch.no_grad(), only(model, name):
            alone = model(input_ids=IDS[row : row + 1]).logits[0]
        assert len(alone) == len(LABELS[name])
        torch.testing.assert_close(mixed[row, : len(alone)], alone)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name for task in LABELS for name in trained if f".{task}." in name} == set(trained)
    assert any("classifier" in name and ".two." in name for name in trained), "both heads"


def test_copies_of_one_adapter_have_the_gradients_of_one_adapter() -> None:
    """The sum over the copies is what a single plain adapter gets; each copy has its own task's."""
    model, shared = model_of()
    single = get_peft_model(bert(), LoraConfig(r=2, lora_alpha=32, target_modules=["query", "value"]))
    state = {name.replace(".one.", ".default."): value for name, value in model.state_dict().items() if ".one." in name}
    assert single.load_state_dict({k: v for k, v in state.items() if "lora" in k}, strict=False).unexpected_keys == []
    heads = {name: model.base_model.model.classifier.modules_to_save[name] for name in LABELS}
    outputs = single.base_model.model.bert(input_ids=IDS).pooler_output
    total: Any = 0
    for row, name in enumerate(NAMES):
        total = total + functional.cross_entropy(heads[name](outputs[row : row + 1]), torch.tensor([1]))
    found = losses(model).sum()
    torch.testing.assert_close(found, total)
    heads["one"].zero_grad()
    found.backward()
    total.backward()
    gramian = shared.gramian([0, 1])
    shared.combine([0, 1], None)
    for name, parameter in single.named_parameters():
        if parameter.requires_grad:
            first, second = (model.get_parameter(name.replace(".default.", f".{task}.")) for task in LABELS)
            torch.testing.assert_close(first.grad, parameter.grad)
            assert second.grad is None, "what follows is not trained by itself"
    model.zero_grad()
    losses(model)[[0, 3]].sum().backward()
    one = torch.cat([part.copies[0].grad.flatten() for part in shared._parts])
    assert gramian[0, 0].item() == pytest.approx(float(one @ one), rel=1e-4)


@pytest.mark.parametrize("name", ["query", "0", "weight", "model"])
def test_a_task_called_as_a_part_of_the_model(name: str) -> None:
    """PEFT, which looks for adapters' names in those of parameters, would leave such parts out of what it saves."""
    with pytest.raises(UserError, match=f"expected names that no part of the model has, got '{name}'"):
        attach(bert(), {"one": SECTION, name: SECTION}, "sequence-classification", 0)


def test_partly_shared_copies() -> None:
    model, shared = model_of(rank=1)
    losses(model).sum().backward()
    a, b = [model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A[task].weight for task in LABELS]
    own, other, total = b.grad[1].clone(), a.grad[1].clone(), a.grad[0] + b.grad[0]
    shared.combine([0, 1], None)
    torch.testing.assert_close(a.grad, torch.stack([total, other]))
    torch.testing.assert_close(b.grad, torch.stack([torch.zeros_like(own), own]))
    with torch.no_grad():
        a.add_(1)
    shared.follow()
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_a_shared_head() -> None:
    model, shared = model_of(head=True)
    first, second = (model.base_model.model.classifier.modules_to_save[task].weight for task in LABELS)
    assert torch.equal(first, second)
    with torch.no_grad():
        first.zero_()
    shared.follow()
    assert float(second.detach().abs().max()) == 0


SURGERY = ["pcgrad", "cagrad", "mgda", "imtl-g", "aligned-mtl", "nash-mtl", "upgrad", "dualproj"]


def available(surgery: str) -> None:
    """Skips where what it needs is not installed."""
    if surgery != "sum":
        pytest.importorskip("torchjd")
        pytest.importorskip(SOLVERS.get(surgery, "torchjd"))


class TestSurgery:
    G, H = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])

    def shared(self, surgery: str) -> tuple[Shared, nn.Parameter]:
        copies = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        shared = Shared([Part(copies)], surgery)
        copies[0].grad, copies[1].grad = self.G.clone(), self.H.clone()
        return shared, copies[0]

    def test_pcgrad_takes_away_what_conflicts(self) -> None:
        pytest.importorskip("torchjd")
        shared, first = self.shared("pcgrad")
        gramian = shared.gramian([0, 1])
        assert cosines(gramian)[0, 1].item() == pytest.approx(-1 / math.sqrt(2))
        shared.combine([0, 1], gramian)
        wanted = (self.G - (self.G @ self.H) / (self.H @ self.H) * self.H) + (self.H - (self.G @ self.H) * self.G)
        torch.testing.assert_close(first.grad, wanted)

    def test_mgda_gives_no_task_the_worse(self) -> None:
        pytest.importorskip("torchjd")
        shared, first = self.shared("mgda")
        shared.combine([0, 1], shared.gramian([0, 1]))
        nearest = torch.tensor([0.2, 0.4])  # of the segment between both, to the origin
        torch.testing.assert_close(first.grad, 2 * nearest, atol=2e-3, rtol=0)

    def test_cagrad_stays_near_the_mean(self) -> None:
        pytest.importorskip("torchjd")
        pytest.importorskip("cvxpy")
        shared, first = self.shared("cagrad")
        shared.combine([0, 1], shared.gramian([0, 1]))
        mean = (self.G + self.H) / 2
        found = first.grad / 2
        assert float((found - mean).norm()) == pytest.approx(0.4 * float(mean.norm()), rel=1e-2)
        assert min(float(found @ self.G), float(found @ self.H)) > min(float(mean @ self.G), float(mean @ self.H))

    @pytest.mark.parametrize("size", [1.0, 1e-4])
    def test_nash_mtl_solves_its_equation(self, size: float) -> None:
        pytest.importorskip("torchjd")
        pytest.importorskip("scipy")
        shared, first = self.shared("nash-mtl")
        for copy in shared._parts[0].copies:
            copy.grad = copy.grad * size
        gramian = shared.gramian([0, 1])
        weights = shared.combine([0, 1], gramian)
        torch.testing.assert_close(gramian @ weights, 1 / weights, rtol=1e-4, atol=0)
        torch.testing.assert_close(first.grad, size * (weights[0] * self.G + weights[1] * self.H).float())

    @pytest.mark.parametrize("scale", [None, 2.0**16])
    def test_nash_mtl_of_gradients_that_are_scaled_up(self, scale: float | None) -> None:
        """As fp16's are until the optimizer's step: the way is that of the gradients themselves, scaled up."""
        pytest.importorskip("torchjd")
        pytest.importorskip("scipy")
        shared, first = self.shared("nash-mtl")
        for copy in shared._parts[0].copies:
            copy.grad = copy.grad * (scale or 1.0)
        trainer = MultiTaskTrainer.__new__(MultiTaskTrainer)
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        trainer.accelerator = SimpleNamespace(scaler=scaler)
        trainer.state = SimpleNamespace(global_step=0)
        trainer.plan = Plan(["a", "b"], [], Weights([1.0, 1.0], "equal"), shared, Memory.of(2), None)
        trainer._step, trainer._logged = {0: [1.0], 1: [1.0]}, Memory.of(2)
        trainer._combine()
        assert float(first.grad.norm()) == pytest.approx(math.sqrt(2) * (scale or 1.0), rel=1e-4)

    @pytest.mark.parametrize("surgery", ["upgrad", "dualproj"])
    def test_projections_give_no_task_the_worse(self, surgery: str) -> None:
        pytest.importorskip("torchjd")
        pytest.importorskip("quadprog")
        pytest.importorskip("qpsolvers")
        shared, first = self.shared(surgery)
        shared.combine([0, 1], shared.gramian([0, 1]))
        assert min(float(first.grad @ self.G), float(first.grad @ self.H)) > -1e-3
        # UPGrad projects each, DualProj the mean, onto what gives neither the worse
        wanted = torch.tensor([0.5, 1.5]) if surgery == "upgrad" else torch.tensor([0.0, 1.0])
        torch.testing.assert_close(first.grad, wanted, atol=1e-2, rtol=0)

    @pytest.mark.parametrize("surgery", SURGERY)
    def test_a_gradient_that_overflowed_is_left_to_the_scaler(self, surgery: str) -> None:
        available(surgery)
        shared, first = self.shared(surgery)
        shared._parts[0].copies[1].grad = torch.tensor([math.inf, 1.0])
        shared.combine([0, 1], shared.gramian([0, 1]))
        assert first.grad.tolist() == [math.inf, 1.0]

    @pytest.mark.parametrize("surgery", ["sum", *SURGERY])
    def test_a_task_that_is_not_in_the_step_changes_nothing(self, surgery: str) -> None:
        available(surgery)
        shared, first = self.shared(surgery)
        shared._parts[0].copies[0].grad = None
        shared.combine([1], shared.gramian([1]))
        torch.testing.assert_close(first.grad, self.H)


class TestWeights:
    LOSSES, TASKS = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1])

    def test_equal_ones_are_those_given(self) -> None:
        found = Weights([3.0, 0.5], "equal")(self.LOSSES, self.TASKS, Memory.of(2))
        assert found.item() == pytest.approx((3 + 1 + 2) / 3)

    def test_uncertainty_settles_where_kendall_s_does(self) -> None:
        weights = Weights([1.0, 1.0], "uncertainty")
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.3)
        for _ in range(400):
            optimizer.zero_grad()
            weights(self.LOSSES, self.TASKS, Memory.of(2)).backward()
            optimizer.step()
        # exp(-s) L + s / 2 is least at s = log 2L
        torch.testing.assert_close(weights.log_variances.detach(), torch.tensor([2.0, 6.0]).log(), rtol=1e-3, atol=0)

    def test_dwa_looks_at_how_fast_losses_fell(self) -> None:
        memory = Memory.of(2)
        for losses in ((4.0, 2.0), (1.0, 2.0)):
            memory.note({0: (losses[0], 3), 1: (losses[1], 5)})
            memory.close_window()
        found = Weights([1.0, 1.0], "dwa", 2.0).now(memory)
        wanted = 2 * torch.softmax(torch.tensor([0.25, 1.0]) / 2, 0)
        torch.testing.assert_close(found, wanted)
        assert memory.rows == [6, 10]
        alike = pytest.importorskip("torchjd.scalarization").DWA(2.0)
        for losses in ((4.0, 2.0), (1.0, 2.0)):
            alike(torch.tensor(losses))
            alike.step()
        torch.testing.assert_close(found, alike._compute_weights(torch.ones(2)))


class TestSampling:
    def test_by_size_every_row_comes_once_an_epoch(self) -> None:
        sampler = TaskSampler([3, 5], 0, None)
        first = list(sampler)
        assert sorted(first) == list(range(8)) and list(sampler) == first
        sampler.epoch = 1
        assert list(sampler) != first

    def test_by_temperature(self) -> None:
        assert by_temperature([900, 100], 1) == [0.9, 0.1]
        assert by_temperature([900, 100], 2) == pytest.approx([0.75, 0.25])
        shares = by_temperature([900, 100], 2)
        drawn = list(TaskSampler([900, 100], 0, lambda place: shares))
        small = Counter(place for place in drawn if place >= 900)
        assert sum(small.values()) == pytest.approx(250, abs=4 * math.sqrt(250 * 0.75))
        assert max(small.values()) - min(small[place] for place in range(900, 1000)) <= 1, "none before all others"

    def test_by_loss_the_slow_task_comes_more_often(self) -> None:
        windows = [[2.0, 1.0], [1.0, 1.0], [0.0, 9.0]]
        assert by_loss(windows, 1) is None and by_loss(windows[:1], 0) is None
        assert by_loss(windows, 3) == pytest.approx([1 / 3, 2 / 3]), "the last window may not be over yet"
        assert by_loss([[1.0, math.nan], [0.5, 1.0]], 3) == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("text", ['{"one": {"wan', "[]", '{"one": {"wanted": 1}}', '{"one": 3}'])
def test_results_alone_that_were_not_written_to_their_end(text: str, tmp_path: Path) -> None:
    (tmp_path / "alone.json").write_text(text)
    assert alone.read(tmp_path) == {}


def test_a_row_s_loss_is_a_mean_over_what_it_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(2, 5, 7, generator=generator),
        torch.tensor([[-100, 1, 2, 3, -100], [4, 5, 6, -100, -100]]),
    )
    found = token_losses(logits, labels, shifted=True)
    for row in range(2):
        wanted = functional.cross_entropy(logits[row, :-1], labels[row, 1:], ignore_index=-100)
        torch.testing.assert_close(found[row], wanted)
