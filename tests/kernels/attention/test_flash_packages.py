"""FlashAttention's packages as stand-ins that compute by the definition, strict about what they are given."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.attention import Mask, attention, choosing
from fastpeft_kernels.attention.candidates import flash, flash4, registry
from fastpeft_kernels.attention.keys import OP, key_of
from fastpeft_kernels.attention.masks import bounded
from fastpeft_kernels.attention.reference import attention_reference
from fastpeft_kernels.attention.scores import Scores
from fastpeft_kernels.tuning.choosing import learn
from fastpeft_kernels.tuning.records import Winner

from .drawn import every_mask, hold, make_case

CPU = torch.device("cpu")


class Package:
    """A stand-in for a FlashAttention package: its documented function, strict about what it is given."""

    def __init__(self, none: int | None, also: tuple[str, ...], pair: bool) -> None:
        self.none, self.also, self.pair = none, also, pair
        self.called: list[dict[str, Any]] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
        self.called.append(dict(given))
        assert not given.keys() - {"softmax_scale", "causal", "window_size", "softcap", "deterministic", *self.also}
        for x, heads in ((q, q), (k, k), (v, k)):
            assert x.stride(-1) == 1 and x.shape[0] == q.shape[0] and x.shape[2] == heads.shape[2]
        left, right = (None if size == self.none else size for size in given["window_size"])
        assert all(size is None or size >= 0 for size in (left, right))
        if given["causal"]:
            right = 0
        scores = Scores(given["softmax_scale"], softcap=given.get("softcap"), sinks=given.get("learnable_sink"))
        mask = bounded(Mask(left, right), q.shape[1], k.shape[1])
        out, lse = attention_reference(*(x.transpose(1, 2) for x in (q, k, v)), mask, scores)
        out = out.transpose(1, 2).contiguous()
        return (out, lse) if self.pair else out


PACKAGES: dict[str, tuple[str, Callable[[], Package], int]] = {
    "fa2": ("flash_attn", lambda: Package(-1, ("dropout_p",), pair=False), 80),
    "fa3": ("flash_attn_interface", lambda: Package(-1, (), pair=False), 90),
    "fa4": ("flash_attn.cute", lambda: Package(None, ("learnable_sink",), pair=True), 90),
}


@pytest.fixture(params=PACKAGES)
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Package]:
    """A package, as it were on a GPU."""
    name: str = request.param
    module, make, capability = PACKAGES[name]
    package = make()
    if "." in module:
        monkeypatch.setitem(sys.modules, module.partition(".")[0], types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, package)
    for place in (flash, flash4):
        monkeypatch.setattr(place, "device_capability", lambda device: capability)
    return name, package


@pytest.mark.parametrize(
    ("mask", "extras"),
    [
        (Mask(), []),
        (Mask(right=0), []),
        (Mask(left=5, right=0), ["softcap"]),
        (Mask(left=3, right=4), []),
        (Mask(left=6), []),
    ],
    ids=str,
)
def test_packages_are_told_what_is_asked_for(installed: tuple[str, Package], mask: Mask, extras: list[str]) -> None:
    name, package = installed
    case = make_case(dtype=torch.bfloat16, mask=mask, extras=extras)

    def ours(case: Any) -> tuple[Tensor, None]:
        out = attention(case.q, case.k, case.v, **case.arguments(), backend=name)
        assert out.transpose(1, 2).is_contiguous()
        return out, None

    hold(case, ours)
    assert len(package.called) == 1 and package.called[0]["deterministic"] is False
    with torch.no_grad():
        attention(case.q, case.k, case.v, **case.arguments(), backend=name, deterministic=True)
    assert package.called[1]["deterministic"] is True


def test_what_packages_cannot_do(installed: tuple[str, Package]) -> None:
    name, package = installed
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dtype": torch.float32}, "fp16 or bf16"),
        ({"features": 264}, "up to 256|up to 128"),
        ({"v_features": 8}, "got 16 and 8"),
        ({"queries": 30, "mask": Mask(right=0)}, "no query that sees no key"),
        ({"mask": Mask(left=-2)}, "mask.left of 0 or more"),
        ({"mask": Mask(right=-1)}, "mask.right of 0 or more"),
        ({"mask": Mask(keys=torch.rand(2, 23) > 0.5)}, "a mask of bounds alone"),
        ({"mask": every_mask(2, 4, 19, 23)["ranges"]}, "a mask of bounds alone"),
        ({"mask": every_mask(2, 4, 19, 23)["dense"]}, "a mask of bounds alone"),
        ({"extras": ["relative"]}, "no biases"),
        ({"extras": ["bias"]}, "no biases"),
        ({"extras": ["dropout"]}, "dropout"),
        ({"extras": ["sinks"]}, "no sinks|sinks in bf16 without gradient"),
    ]
    for sizes, reason in refused:
        case = make_case(**{"dtype": torch.bfloat16, **sizes})
        with pytest.raises(ValueError, match=f"backend: '{name}' was asked for, which cannot serve: .*({reason})"):
            attention(case.q, case.k, case.v, **case.arguments(), backend=name)
    case = make_case(dtype=torch.bfloat16)
    for more, reason in (({"return_lse": True}, "return_lse=False"), ({"scale": -0.3}, "scale above 0")):
        with pytest.raises(ValueError, match=reason):
            attention(case.q, case.k, case.v, backend=name, **more)
    odd = make_case(dtype=torch.bfloat16, features=20)
    if name == "fa2":
        attention(odd.q, odd.k, odd.v, backend=name, dropout=0.25)
        assert package.called[-1]["dropout_p"] == 0.25
        with pytest.raises(ValueError, match="without softcap"):
            attention(odd.q, odd.k, odd.v, backend=name, dropout=0.25, softcap=2.0)
    else:
        with pytest.raises(ValueError, match="multiple of 8"):
            attention(odd.q, odd.k, odd.v, backend=name)
    if name == "fa4":
        sinks = torch.randn(4, dtype=torch.bfloat16)
        found = attention(case.q, case.k, case.v, sinks=sinks, backend=name)
        assert torch.equal(found, attention(case.q, case.k, case.v, sinks=sinks, backend="reference"))


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(dtype=torch.bfloat16)
    for name, (module, _, capability) in PACKAGES.items():
        with pytest.raises(ValueError, match="expected q on an NVIDIA GPU, got cpu"):
            attention(case.q, case.k, case.v, backend=name)
        with monkeypatch.context() as on_a_gpu:
            on_a_gpu.setattr(flash, "device_capability", lambda device: 75)
            with pytest.raises(ValueError, match=f"expected a compute capability that {module} is built for, got 7.5"):
                attention(case.q, case.k, case.v, backend=name)
            on_a_gpu.setattr(flash, "device_capability", lambda device, it=capability: it)
            on_a_gpu.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=f"{module} cannot be used: "):
                attention(case.q, case.k, case.v, backend=name)
    for name in ("cudnn", "flash", "efficient"):
        with pytest.raises(ValueError, match="expected q on a GPU, got cpu"):
            attention(case.q, case.k, case.v, backend=name)
    assert registry.labels(CPU) == ("flex", "compact") and choosing.attention_backends(CPU) == ("sdpa", "blockwise")


def test_a_measured_choice_is_taken_where_it_serves(
    monkeypatch: pytest.MonkeyPatch, measured_choices: Path, installed: tuple[str, Package]
) -> None:
    name, package = installed
    case = make_case(queries=64, keys=64, dtype=torch.bfloat16, mask=Mask(right=0))
    version = flash.version_of("flash-attn")
    monkeypatch.setattr(registry.CANDIDATES[name], "version", lambda: version)
    key = key_of(case.q, case.k, case.mask, case.scores, True)
    monkeypatch.setattr(choosing, "attention_backends", lambda device: ("sdpa", *registry.labels(device)))
    learn(CPU, Winner(OP, key._asdict(), f"{name} {version}", {}))
    attention(case.q, case.k, case.v, mask=case.mask)
    assert len(package.called) == 1
    attention(case.q, case.k, case.v[..., :8], mask=case.mask)  # of the same case, not served
    attention(case.q, case.k, case.v, mask=case.mask, return_lse=True)
    assert len(package.called) == 1
    learn(CPU, Winner(OP, key._asdict(), f"{name} 0.1", {}))
    attention(case.q, case.k, case.v, mask=case.mask)
    assert len(package.called) == 1
