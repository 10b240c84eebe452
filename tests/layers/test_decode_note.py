"""A 4-bit weight that bitsandbytes itself misreads on some CPUs is followed, and named in the report."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft.integrations import bitsandbytes
from fastpeft.integrations.bitsandbytes import decode_note, frozen_weight
from fastpeft_kernels.native import native_library

bnb = pytest.importorskip("bitsandbytes")


def model(in_features):
    base = nn.Sequential(bnb.nn.Linear4bit(in_features, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4"))
    return get_peft_model(base.to("cpu"), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))


@pytest.mark.parametrize("in_features", [64, 96])
def test_same_numbers_as_peft_and_a_note_where_the_decoder_is_wrong(in_features):
    peft_model = model(in_features)
    base = peft_model.base_model.model[0].base_layer
    base.support_avx512bf16_for_cpu = False
    x = torch.randn(3, in_features, requires_grad=True)
    before = peft_model(x)
    fastpeft.accelerate(peft_model)
    torch.testing.assert_close(peft_model(x), before)
    wrong = in_features == 96 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert bool(decode_note(base)) == wrong
    assert ("misreads 4-bit rows of 96" in str(fastpeft.report(peft_model))) == wrong


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("in_features", [64, 96])
def test_our_decoder_fills_a_warm_buffer_unless_theirs_has_to_be_followed(monkeypatch, in_features, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    frozen = frozen_weight(model(in_features).base_model.model[0].base_layer)
    followed = in_features == 96 and capability == "AVX512"
    assert frozen.fills == (not followed and native_library() is not None)
    monkeypatch.setattr(bitsandbytes, "native_library", lambda: None)
    assert not frozen.fills
