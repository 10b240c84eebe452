"""What the op costs: products, decodes, packings and bytes kept, counted."""

import pytest
import torch

from fastpeft_kernels.lora import Dtypes, LoraProjection, library, lora_linear_group
from fastpeft_kernels.lora.api import draw_seeds, run_group
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.allocations import largest
from tests.kernels.lora.groups import adapter, parameters, projection

F32 = Dtypes(torch.float32, torch.float32, torch.float32)
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"}


def products(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return sum(event.count for event in profile.key_averages() if event.key in PRODUCTS), result


def test_products_forward_and_backward():
    """Forward 1 + 2n, backward 3n + 2 (dY W, dY B, dY^T S each; dS A and dS^T X once)."""
    for n in (1, 2, 3):
        group = [projection(16, 8, 4) for _ in range(n)]
        x = torch.randn(5, 16, requires_grad=True)
        forward, ys = products(lambda group=group, x=x: lora_linear_group(x, group))
        backward, _ = products(lambda ys=ys: torch.autograd.backward(ys, [torch.randn_like(y) for y in ys]))
        assert (forward, backward) == (1 + 2 * n, 3 * n + 2)


def test_one_packing_in_forward_and_one_in_backward(groups_in_python, monkeypatch):
    calls = []
    pack = library.pack
    monkeypatch.setattr(library, "pack", lambda *args: calls.append(1) or pack(*args))
    ys = lora_linear_group(torch.randn(5, 16, requires_grad=True), [projection(16, 8, 4) for _ in range(3)])
    assert len(calls) == 1
    sum(y.sum() for y in ys).backward()
    assert len(calls) == 2


def test_each_weight_is_decoded_once_in_forward_and_once_in_backward(monkeypatch):
    calls = []
    decode = FourBitWeight.decode
    monkeypatch.setattr(FourBitWeight, "decode", lambda *args, **kw: calls.append(1) or decode(*args, **kw))
    group = [
        LoraProjection(FourBitWeight(encode_4bit(torch.randn(8, 64))), None, (adapter(4, 64, 8),)) for _ in range(3)
    ]
    ys = lora_linear_group(torch.randn(5, 64, requires_grad=True), group)
    assert len(calls) == 3
    sum(y.sum() for y in ys).backward()
    assert len(calls) == 6


def test_kept_for_backward_are_x_and_s_once():
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    group = [projection(64, 48, 4, dropout=0.1) for _ in range(3)]
    x = torch.randn(128, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear_group(x, group)
    for parameter in parameters(group):  # no copy of them
        kept.pop(parameter.untyped_storage()._cdata)
    assert sum(kept.values()) == x.nbytes + 4 * 128 * 12


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("in_python", [False, True])
def test_no_matrix_of_the_weight_s_size_is_made(dropout, in_python, request):
    """Over dense bases, of which nothing is decoded; three active adapters, two siblings."""
    if in_python:
        request.getfixturevalue("groups_in_python")
    group = [projection(512, out, 4, 3, 6, dropout=dropout, with_bias=True) for out in (2048, 1024)]
    x = torch.randn(5, 512, requires_grad=True)
    found = largest(lambda: sum(y.sum() for y in lora_linear_group(x, group)).backward())
    assert 0 < found <= 1024 * 512 * 4 // 4


def test_the_host_reads_no_number(monkeypatch):
    """On the meta device there is none to read: what a CUDA graph records must not depend on one."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    with torch.device("meta"):
        group = [projection(16, 8, 4, 2, dropout=0.25, scaling=torch.tensor(0.5), with_bias=True) for _ in range(2)]
        x = torch.randn(5, 16, requires_grad=True)
        ys = run_group(x, group, F32, draw_seeds(x.device, group, training=True))
        sum(y.sum() for y in ys).backward()
    assert all(y.is_meta for y in ys) and all(t.grad is not None for t in (x, *parameters(group)))
