"""What fastpeft would do on this machine: which part computes on what, and what is left to PEFT and PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fastpeft.integrations.versions import CORE

from .findings import Finding, Status, in_short, note, ok, problem
from .machine import Machine

MATRIX_CAPABILITY = 80  # below it Triton has no tensor cores, and our matrix kernels refuse
_TOLERANCE = 0.01  # in norm, relative; TF32, if somebody has switched it on, is at about 0.0005


def acceleration(machine: Machine, earlier: Mapping[str, Finding]) -> Iterator[Finding]:
    """Findings for LoRA over dense and over 4-bit weights, our Triton kernels, and the rest.

    Args:
        earlier: what the checks before found, by name.
    """
    if machine.torch.error:
        advice = "Put torch right first: all else stands on it."
        yield note("lora", "nothing can be accelerated without torch", advice)
        return
    lacking = [name for name in CORE if name in earlier and earlier[name].status is Status.problem]
    runs = _value(earlier, "triton", "runs") is True
    if machine.torch.gpus and _value(earlier, "triton", "runs") is False:
        lacking.append("triton")  # it can be imported, so decoding and dropout would take it, and fail
    yield _lora(machine, earlier, lacking, runs)
    yield _four_bit(machine, earlier, lacking, runs)
    yield _kernels(machine, earlier, runs)
    yield _left()


def _lora(machine: Machine, earlier: Mapping[str, Finding], lacking: list[str], runs: bool) -> Finding:
    if lacking:
        return _waits("lora", lacking)
    if wrong := lora_error(machine.device):
        advice = (
            "Compare with plain PyTorch on this device: if it works there, please report this as a bug of fastpeft."
        )
        return problem("lora", f"the op fails on this device: {wrong}", advice, accelerated=False)
    native = _compiles(machine, earlier)
    dropout = "triton" if runs else "c++" if native else "torch"
    library = "cuBLAS" if machine.torch.gpus else "the CPU's library"
    words = {"triton": "our Triton kernel", "c++": "our C++", "torch": "PyTorch"}[dropout]
    text = f"accelerated: forward and backward in one op, products by {library}, dropout by {words}"
    return ok("lora", text, accelerated=True, products="library", dropout=dropout)


def _four_bit(machine: Machine, earlier: Mapping[str, Finding], lacking: list[str], runs: bool) -> Finding:
    name = "lora 4-bit"
    if _value(earlier, "bitsandbytes", "four_bit") is not True:
        lacking = [*lacking, "bitsandbytes"]
    if lacking:
        return _waits(name, lacking)
    values = {"accelerated": True, "products": "library"}
    if not machine.torch.gpus:
        who, decode = ("our C++", "c++") if _compiles(machine, earlier) else ("bitsandbytes", "bitsandbytes")
        return ok(name, f"accelerated as lora; {who} decodes", **values, decode=decode)
    if runs:
        return ok(name, "accelerated as lora; our Triton kernel decodes", **values, decode="triton")
    advice = "Put Triton right for speed: decoding by PyTorch takes several passes over memory."
    return note(name, "accelerated as lora, but PyTorch decodes, slowly", advice, **values, decode="torch")


def _compiles(machine: Machine, earlier: Mapping[str, Finding]) -> bool:
    """Whether our C++ serves: on a CPU, with a compiler."""
    return not machine.torch.gpus and bool(_value(earlier, "compiler", "cxx")) and sys.platform != "win32"


def _kernels(machine: Machine, earlier: Mapping[str, Finding], runs: bool) -> Finding:
    """Our Triton kernels as a whole. Those that multiply serve by default on Hopper, where they were measured."""
    name = "triton kernels"
    if not machine.torch.gpus:
        return ok(name, "not used: they need an NVIDIA GPU, and the library serves without", matrix="none")
    if _value(earlier, "triton", "runs") is False:
        return _waits(name, ["triton"])
    if not runs:
        advice = "Follow the advice on triton above; PyTorch decodes and drops until then."
        return note(name, "not used: no Triton that works", advice, matrix="none")
    old = [gpu.index for gpu in machine.torch.gpus if gpu.capability is None or gpu.capability < MATRIX_CAPABILITY]
    if old:
        which = ", ".join(f"gpu {index}" for index in old)
        text = f"decoding and dropout only: {which} has no tensor cores that Triton can use, cuBLAS multiplies"
        return ok(name, text, matrix="none")
    text = "decoding, dropout and activations; products on Hopper, elsewhere where fastpeft tune finds them faster"
    if any(finding.values.get("safe") is False for finding in earlier.values()):
        text = f"{text}, and those with dropout are refused with this ptxas"
    return ok(name, text, matrix="on request")


def _left() -> Finding:
    text = "PEFT computes LoRA variants other than DoRA, 8-bit and other bases, convolutions and embeddings itself"
    return ok("left as is", text)


def _waits(name: str, lacking: list[str]) -> Finding:
    which = " and ".join(lacking)
    return note(name, f"waits for {which} to be put right", f"Follow the advice on {which} above.", accelerated=False)


def lora_error(device: str) -> str:
    """Run the op forward and backward on small tensors beside plain PyTorch; empty when they agree."""
    import torch

    from fastpeft_kernels.lora import lora_linear

    try:
        x, weight, a, b = (torch.randn(size, device=device) for size in ((16, 64), (48, 64), (8, 64), (48, 8)))
        inputs = [tensor.requires_grad_() for tensor in (x, a, b)]
        ours = lora_linear(x, weight, a, b, scaling=0.5)
        plain = x @ weight.T + 0.5 * (x @ a.T @ b.T)
        dy = torch.randn_like(plain)
        mine, theirs = ([y, *torch.autograd.grad(y, inputs, dy)] for y in (ours, plain))
        pairs = [(one.detach(), other.detach()) for one, other in zip(mine, theirs, strict=True)]
        errors = [float((one - other).norm() / other.norm()) for one, other in pairs]
    except Exception as error:
        return in_short(error)
    wrong = [error for error in errors if not error <= _TOLERANCE]  # so that NaN is wrong too
    return f"results are off by {wrong[0]:.2g} of their norm" if wrong else ""


def _value(earlier: Mapping[str, Finding], name: str, key: str) -> Any:
    return earlier[name].values.get(key) if name in earlier else None
