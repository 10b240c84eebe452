"""What an import loads, proved in fresh processes."""

import pytest

from tests.fresh import run_fresh

OPS = """
import torch
from fastpeft_kernels.lora import lora_linear
from fastpeft_kernels.quant import decode_4bit, encode_4bit

weight = torch.randn(24, 64)
packed = encode_4bit(weight, "nf4", 64)
assert (decode_4bit(packed) - weight).abs().max() < 1
x, a, b = torch.randn(5, 64, requires_grad=True), torch.randn(4, 64), torch.randn(24, 4)
y = lora_linear(x, weight, a, b, scaling=0.5)
y.sum().backward()
assert torch.allclose(y, x @ weight.T + 0.5 * (x @ a.T @ b.T), atol=1e-3) and x.grad is not None
"""


def test_importing_fastpeft_loads_nothing_heavy() -> None:
    code = "import fastpeft; fastpeft.__version__, dir(fastpeft)\nprint(*sorted(sys.modules))"
    loaded = set(run_fresh(code).split())
    heavy = {
        "torch",
        "triton",
        "transformers",
        "peft",
        "bitsandbytes",
        "trl",
        "datasets",
        "numpy",
        "yaml",
        "accelerate",
    }
    assert not loaded & heavy


def test_public_names_are_functions_and_unknown_ones_are_errors() -> None:
    code = """
import fastpeft
for name in fastpeft.__all__:
    if name != "__version__":
        function = getattr(fastpeft, name)
        assert callable(function) and function.__name__ == name, name
        assert getattr(fastpeft, name) is function
try:
    fastpeft.no_such_name
except AttributeError as error:
    print(error)
"""
    assert run_fresh(code) == "module 'fastpeft' has no attribute 'no_such_name'\n"


def test_importing_the_ops_asks_no_gpu_and_loads_no_triton() -> None:
    code = """
import torch
def asked(*_args, **_kwargs): raise AssertionError("a GPU was asked for at import")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability"):
    setattr(torch.cuda, name, asked)
before = set(sys.modules)
import fastpeft_kernels.common.device, fastpeft_kernels.lora, fastpeft_kernels.quant, fastpeft_kernels.weights
assert "triton" not in set(sys.modules) - before and not torch.cuda.is_initialized()
"""
    run_fresh(code)


NO_ASSEMBLER = """
from fastpeft_kernels.common import device
assert not device.triton_available() and device.ptxas_version() is None
"""


@pytest.mark.parametrize("blocked", [["triton"], ["bitsandbytes"], ["triton", "bitsandbytes", "peft", "transformers"]])
def test_the_ops_run_on_cpu_without(blocked: list[str]) -> None:
    run_fresh(OPS + NO_ASSEMBLER * ("triton" in blocked), blocked)
