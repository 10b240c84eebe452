"""Whole steps with products in FP8 beside those in 16 bits, and LoRA over transformers' FP8Linear."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastpeft.bench.steps import StepCase

order = 50
time_limit_s = 240
needs = ("peft",)

SETTINGS: tuple[Literal["forward", "both"], ...] = ("forward", "both")


def run(recorder: Recorder, depth: str, small: bool = False) -> None:
    import torch

    from fastpeft.bench.steps import StepCase
    from fastpeft_kernels.fp8 import fp8_refusal

    large = StepCase("llama", "lora", torch.bfloat16, hidden=4096, layers=2, rows=4, tokens=2048)
    case = StepCase("llama", "lora", torch.bfloat16, hidden=64, layers=1, tokens=16) if small else large
    checks = [("FP8Linear, its weight decoded", partial(_decoded, recorder.device))]
    if small or fp8_refusal(torch.device("cuda", torch.cuda.current_device())) is None:
        checks.insert(0, ("accuracy of layers", partial(_accuracy, case, recorder.device)))
    if not small:
        checks.append(("FP8Linear, its own product", partial(_own_product, recorder.device)))
        checks.append(("steps", partial(_steps, recorder, case, depth)))
    recorder.run_checks("fp8", checks)


dry_run = partial(run, small=True)


def _accuracy(case: StepCase, device: str) -> dict[str, Any]:
    import fastpeft
    from fastpeft.bench.steps import build, make_batch

    found = fastpeft.fp8_report(fastpeft.accelerate(build(case, device)), make_batch(case, device))
    assert found.rows and not found.left, f"layers left out: {found.left}"
    worst = max(found.rows, key=lambda row: row.norm)
    assert worst.norm < 0.1, str(found)
    return {"worst_norm": worst.norm, "worst": worst.path, "least_cosine": min(row.cosine for row in found.rows)}


def _steps(recorder: Recorder, case: StepCase, depth: str) -> dict[str, Any]:
    """Gradients near those of 16 bits, and milliseconds a step."""
    import fastpeft
    from fastpeft.bench.steps import build, make_batch
    from fastpeft.bench.timer import interleaved, ratio

    batch = make_batch(case, recorder.device)
    model = build(case, recorder.device)
    models = {"16 bits": fastpeft.accelerate(copy.deepcopy(model))}
    models |= {s: fastpeft.accelerate(copy.deepcopy(model), fp8_compute=s) for s in SETTINGS}
    gradients = {name: _gradients(each, batch) for name, each in models.items()}
    figures: dict[str, Any] = {}
    for setting in SETTINGS:
        ops = {row.op for row in fastpeft.report(models[setting]).accelerated if row.kind == "lora"}
        assert all("FP8" in op for op in ops), ops
        figures[f"distance_{setting}"] = distance = _distance(gradients[setting], gradients["16 bits"])
        assert distance < 0.3, f"{setting}: gradients differ by {distance:.3f} of their norm"
    rounds = {"quick": 7, "default": 15, "full": 40}[depth]
    steps = {name: partial(_gradients, each, batch) for name, each in models.items()}
    samples = interleaved(steps, rounds, device=recorder.device)
    for name, milliseconds in samples.items():
        recorder.add(case=case.name, op="fp8", peer=name, metric="step time", unit="ms", samples=milliseconds)
    return figures | {f"time_ratio_{setting}": ratio(samples, setting, "16 bits") for setting in SETTINGS}


def _decoded(device: str) -> dict[str, Any]:
    """Over FP8Linear with `fp8_compute="never"`: as PEFT over an ordinary layer of the same values."""
    import torch

    import fastpeft
    from fastpeft.integrations import finegrained_fp8

    ours = _adapted_fp8_linear(device)
    twin = copy.deepcopy(ours)  # PEFT makes the adapters' first values in the dtype of the weight
    layer: Any = twin.get_submodule("base_model.model.0")
    layer.base_layer = finegrained_fp8.dense_linear(layer.base_layer).to(torch.bfloat16)
    fastpeft.accelerate(ours, fp8_compute="never")
    error = _difference(ours, twin, device)
    assert error < 0.02, f"{error:.4f} of the norm"
    (row,) = fastpeft.report(ours).rows
    assert not row.note, row.note
    return {"difference": error}


def _own_product(device: str) -> dict[str, Any]:
    """By default as PEFT, with transformers' product; where its kernels cannot be had, says so."""
    import fastpeft

    peft = _adapted_fp8_linear(device)
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    try:
        _output(peft, device)
    except Exception as refusal:  # whatever fetching and compiling kernels says
        return {"not_here": f"{type(refusal).__name__}: {refusal}"}
    error = _difference(ours, peft, device, gradients=False)
    assert error < 0.01, f"{error:.4f} of the norm"
    return {"difference": error}


def _adapted_fp8_linear(device: str) -> nn.Module:
    """LoRA over an FP8Linear of random codes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers.integrations.finegrained_fp8 import FP8Linear

    torch.manual_seed(0)
    layer: Any = FP8Linear(256, 512, block_size=(128, 128)).requires_grad_(False)
    layer.weight.data = (torch.randn((512, 256)) * 100).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(tuple(layer.weight_scale_inv.shape)) * 1e-3 + 1e-4
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(layer), config).to(device)  # type: ignore[arg-type]


def _output(model: nn.Module, device: str) -> tuple[Tensor, Tensor]:
    """(y, x), the same x each time."""
    import torch

    x = torch.randn((3, 50, 256), generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    x.requires_grad_()
    return model(x), x


def _difference(ours: nn.Module, theirs: nn.Module, device: str, gradients: bool = True) -> float:
    """The largest relative distance of output, gradient of x and the adapters' gradients."""
    import torch

    results = []
    for model in (ours, theirs):
        y, x = _output(model, device)
        found = [y.detach()]
        if gradients:
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
            found += torch.autograd.grad(y, [x, *[p for p in model.parameters() if p.requires_grad]], dy)
        results.append(found)
    return max(_distance([a], [b]) for a, b in zip(*results, strict=True))


def _gradients(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(model(**batch).loss, trained))


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    import torch

    a, b = (torch.cat([tensor.float().flatten() for tensor in tensors]) for tensors in (found, wanted))
    return ((a - b).norm() / b.norm()).item()
