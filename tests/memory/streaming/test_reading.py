"""A streamed weight is read, written and copied outside its layer's turn as one on the device is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.memory.layers import model_layers
from fastpeft.memory.streaming.stowing import Stowed
from tests.memory.streaming.test_streaming import _small, on_device, ring_of, started, streamed  # noqa: F401
from tests.memory.test_policies import seeded

READINGS: dict[str, Callable[[nn.Parameter], Any]] = {
    "repr": lambda p: repr(p) if type(p).__name__ == "Parameter" else repr(p.data),
    "format": lambda p: f"{p.view(-1)[0]:.3f}",
    "sum": lambda p: p.sum(),
    "float": lambda p: p.float().norm(),
    "detach": lambda p: p.detach().float().abs().mean(),
    "data": lambda p: p.data.clone(),
    "index": lambda p: p[0],
    "iterate": lambda p: [row.sum() for row in p],
    "item": lambda p: p.view(-1)[1].item(),
    "tolist": lambda p: p.tolist(),
    "numpy": lambda p: p.numpy(),
    "cpu": lambda p: p.detach().cpu().numpy(),
    "foreach": lambda p: torch._foreach_norm([p.float()]),
    "norms": lambda p: torch.nn.utils.get_total_norm([p.float(), p.float()]),
    "as_subclass": lambda p: p.as_subclass(Tensor),
    "matmul": lambda p: torch.ones(1, p.shape[0]) @ p.float(),
    "average": lambda p: torch.zeros(p.shape).lerp_(p.detach().float(), 0.5),
    "into": lambda p: torch.empty(p.shape, dtype=p.dtype).copy_(p),
    "stack": lambda p: torch.stack([p, p]),
    "equal": lambda p: torch.equal(p, p.clone()),
    "deepcopy": lambda p: copy.deepcopy(p).sum(),
    "copy": lambda p: copy.copy(p).sum(),
    "pickle": lambda p: pickle.loads(pickle.dumps(p)).sum(),
    "save": lambda p: _saved(p).sum(),
    "save_data": lambda p: _saved(p.data).sum(),
    "inference": lambda p: torch.inference_mode()(lambda: p.float().sum())(),
    "out": lambda p: torch.add(p, 1, out=torch.empty_like(p)),
}


def _saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert "Hidden" not in str(type(found).__mro__) and "Copied" not in str(type(found).__mro__)
    return found


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, (list, tuple)) and wanted and isinstance(wanted[0], Tensor):
        return all(map(torch.equal, found, wanted))
    return bool((found == wanted).all()) if hasattr(wanted, "shape") else bool(found == wanted)


@pytest.mark.parametrize("four_bits", [False, pytest.param(True, marks=pytest.mark.full)])
def test_every_way_of_reading(four_bits: bool) -> None:
    model, given, wanted = started(**({"double_quant": True} if four_bits else {}))
    parameters = {n: p for n, p in model.named_parameters() if "base_layer.weight" in n}
    answers = {name: {how: read(p) for how, read in READINGS.items()} for name, p in parameters.items()}
    kinds = {type(p).__name__ for p in parameters.values()}
    streamed(model, "recompute")
    small = on_device(model)
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter and isinstance(parameter, nn.Parameter)
        for how, read in READINGS.items():
            assert same(read(parameter), answers[name][how]), how
    assert {type(p).__name__ for p in parameters.values()} == kinds and on_device(model) == small
    assert torch.equal(torch.stack([p.float().norm() for p in parameters.values()]).norm(), _norm(answers))
    assert seeded(model, given).equals(wanted)


def _norm(answers: dict[str, Any]) -> Tensor:
    return torch.stack([answer["float"] for answer in answers.values()]).norm()


def stowed(model: nn.Module) -> Stowed:
    """One in the middle of a model."""
    return ring_of(model).bundles[1].stowed[0]


def test_what_is_kept_of_a_reading_stays() -> None:
    """Whatever the ring does meanwhile."""
    model, given, _ = started()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    streamed(model)
    taken = [{n: p.data for n, p in model.named_parameters()}]
    for _ in range(2):
        model(**given).loss.backward()
        taken.append({n: p.detach() for n, p in model.named_parameters() if not p.requires_grad})
    ring_of(model).empty()
    assert all(torch.equal(value, weights[name]) for found in taken for name, value in found.items())


def test_what_asks_for_no_values_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, *_ = started()
    streamed(model)
    parameter = stowed(model).tensor
    monkeypatch.setattr("fastpeft.memory.streaming.reading._on_copies", None)
    assert parameter.shape == parameter.size() and parameter.numel() == parameter.nbytes // parameter.element_size()
    assert parameter.to(parameter.device) is parameter and parameter.to(parameter.dtype).float() is parameter
    assert not parameter.requires_grad and parameter.grad is None and parameter.is_leaf and len(parameter)
    assert hash(parameter) == id(parameter) and parameter in {parameter}
    assert parameter.device.type == "cpu" and parameter.untyped_storage().nbytes() == 0
    assert sum(p.numel() for p in model.parameters()) > 0 and model.to("cpu").num_parameters() > 0


WRITINGS: tuple[Callable[[nn.Parameter], Any], ...] = (
    lambda p: p.mul_(2),
    lambda p: p.copy_(p.clone() * 2),
    lambda p: p.__setitem__(slice(None), p * 2),
    lambda p: torch._foreach_mul_([p], 2),
    lambda p: torch.mul(p, 2, out=p),
    lambda p: setattr(p, "data", p.data * 2),
    lambda p: p.set_((p * 2).clone()),
)


@pytest.mark.parametrize("writings", [WRITINGS[4:], pytest.param(WRITINGS[:4], marks=pytest.mark.full)])
def test_what_is_written_outside_its_turn_holds(writings: tuple[Callable[[nn.Parameter], Any], ...]) -> None:
    model, given, _ = started(lora={"lora_dropout": 0.0})
    other = copy.deepcopy(model)
    streamed(model, "recompute")
    for write in writings:
        for one in (model, other):
            for layer in model_layers(one).values():
                with torch.no_grad():
                    write(layer.self_attn.q_proj.base_layer.weight)
                    layer.self_attn.q_proj.base_layer.weight.mul_(0.5)
                    write(layer.mlp.up_proj.base_layer.weight)
                    write(layer.self_attn.q_proj.base_layer.weight)
                    layer.self_attn.q_proj.base_layer.weight.mul_(0.4)
            one.zero_grad()
        assert seeded(model, given).equals(seeded(other, given))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_values_that_apply_changes_are_those_of_the_host() -> None:
    model, given, _ = started(lora={"lora_dropout": 0.0})
    other = copy.deepcopy(model)
    streamed(model, "recompute")
    for change in (lambda t: t * 0.5, lambda t: t.clone(), lambda t: t.mul_(0.5)):
        with torch.no_grad():
            model._apply(change)
            other._apply(change)
    assert seeded(model, given).equals(seeded(other, given))
    with pytest.raises(TypeError, match="a streamed layer cannot be shared between processes, its weights"):
        model.share_memory()


@pytest.mark.full
def test_a_write_to_the_state_dict_holds() -> None:
    model, given, _ = started(lora={"lora_dropout": 0.0})
    other = copy.deepcopy(model)
    streamed(model)
    model(**given)
    for one in (model, other):
        for name, value in one.state_dict().items():
            if "base_layer" in name:
                value.mul_(0.5)
    assert seeded(model, given).equals(seeded(other, given))


LOST: tuple[Callable[[Tensor], Any], ...] = (
    lambda p: p.data.mul_(2),
    lambda p: p.detach()[0].zero_(),
    lambda p: p.view(-1).add_(1),
)


def test_a_write_that_would_be_lost_is_an_error() -> None:
    model, given, wanted = started()
    streamed(model)
    for write in LOST:
        with torch.no_grad(), pytest.raises(RuntimeError, match="a copy of a streamed weight was written into, which"):
            write(stowed(model).tensor)
    assert seeded(model, given).equals(wanted)


@pytest.mark.full
@pytest.mark.parametrize("four_bits", [False, True])
def test_a_part_of_a_layer_by_itself(four_bits: bool) -> None:
    model, *_ = started(lora={"lora_dropout": 0.0}, **({"double_quant": True} if four_bits else {}))
    x = torch.randn(2, 5, 64)

    def parts(model: nn.Module) -> list[Tensor]:
        layer = list(model_layers(model).values())[1]
        given = x.clone().requires_grad_()
        y = layer.mlp(given) + layer.self_attn.o_proj(given)
        y.sum().backward()
        assert given.grad is not None
        return [y.detach(), given.grad]

    wanted = parts(model)
    streamed(model)
    for found, right in zip(parts(model), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_leaving_takes_it_all_away() -> None:
    model, *_ = started()
    classes = {n: type(p) for n, p in model.named_parameters()}
    streamed(model)
    report = str(fastpeft.report(model))
    assert "turn" not in report
    fastpeft.restore(model)
    assert {n: type(p) for n, p in model.named_parameters()} == classes
    assert not any(p.__dict__ for p in model.parameters())
