"""Real checkpoints: `verify` passes, and every attention and MLP projection is served, together with its siblings."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

import fastpeft
from tests.integration.models import trained
from tests.integration.reports import adapter_rows, notes, siblings
from tests.integration.steps import Step, assert_each_close, assert_step_close, step, truth
from tests.integration.test_attention_models import wide_softmax
from tests.integration.test_loss import loss_row, never_made

TEXT = ["Once upon a time there was a little girl who", "The cat sat.", "One day, he went out to play in the snow and"]
LLAMA = {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})}


def test_decoder_with_lora(real_models: Path) -> None:
    folder = real_models / "stories15m"
    model = lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "CAUSAL_LM")
    inputs = texts(folder, model)
    peft, exact = step(model, inputs), exact_step(model, inputs)
    check(model)
    with never_made():
        assert_step_close(step(model, inputs), peft, exact)
    assert not loss_row(model).note
    assert siblings(model) == LLAMA
    assert every_projection(model, {"embed_tokens", "lm_head"})


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
def test_decoder_with_qlora(real_models: Path, dtype: torch.dtype) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    folder = real_models / "stories15m"
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype)
    model = lora(prepare_model_for_kbit_training(base), "CAUSAL_LM")
    check(model)
    assert siblings(model) == LLAMA
    assert every_projection(model, {"embed_tokens", "lm_head"})
    assert {row.op for row in adapter_rows(model)} == {"lora_linear over 4-bit"}


def test_encoder_with_lora(real_models: Path) -> None:
    folder = real_models / "minilm"
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    model = lora(base, "SEQ_CLS").eval()
    inputs = {**texts(folder, model), "labels": torch.tensor([0, 1, 1])}
    peft, exact = step(model, inputs), truth(model, inputs)
    check(model)
    assert_step_close(step(model, inputs), peft, exact)
    assert siblings(model) == {frozenset({"query", "key", "value"})}
    assert every_projection(model, {"classifier"})


@pytest.mark.parametrize("text", TEXT[:1])
def test_generated_text_is_that_of_peft(real_models: Path, text: str) -> None:
    folder = real_models / "stories15m"
    model = lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "CAUSAL_LM", size=0.01).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    written = [model.generate(ids, max_new_tokens=12, do_sample=False) for _ in range(2) if fastpeft.report(model)]
    fastpeft.accelerate(model)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), written[0])


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.full)])
def test_generated_text_is_that_of_eager_attention(real_models: Path, beams: int) -> None:
    """Of prompts of different length, padded on the left."""
    folder = real_models / "stories15m"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    given = tokenizer(TEXT, return_tensors="pt", padding=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "pad_token_id": tokenizer.pad_token_id}
    wanted = model.generate(given.input_ids, attention_mask=given.attention_mask, **options)
    fastpeft.accelerate(model)
    assert len(attention_rows(model)) == 6
    found = model.generate(given.input_ids, attention_mask=given.attention_mask, **options)
    assert torch.equal(found, wanted) and not any(row.note for row in attention_rows(model))


def test_embeddings_are_those_of_eager_attention(real_models: Path) -> None:
    """The mean of the tokens' states, as this encoder's users take it: both within the same distance of fp64."""
    folder = real_models / "minilm"
    given = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt", padding=True)
    seen = given.attention_mask[..., None]
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = fastpeft.accelerate(copy.deepcopy(plain))
    assert len(attention_rows(model)) == 6

    def embedded(each: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return (each(**given).last_hidden_state * seen).sum(1) / seen.sum(1)

    with wide_softmax():
        exact = embedded(copy.deepcopy(plain).double())
    assert_each_close(embedded(model), embedded(plain), exact)
    assert not any(row.note for row in attention_rows(model))


def attention_rows(model: nn.Module) -> list[Any]:
    return [row for row in fastpeft.report(model).rows if row.kind == "attention" and row.accelerated]


def exact_step(model: Any, inputs: dict[str, torch.Tensor]) -> Step:
    """`truth` with a loss in fp64 too: transformers' casts logits to fp32."""
    base = model.get_base_model()
    base.loss_function = _loss
    try:
        return truth(model, inputs)
    finally:
        del base._loss_function


def _loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def lora(base: nn.Module, task: Any, size: float = 0.1) -> Any:
    model = trained(get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type=task)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(size)
    return model.train()


def texts(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = dict(tokenizer(TEXT, return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def check(model: nn.Module) -> None:
    outcome = fastpeft.verify(fastpeft.accelerate(model))
    assert outcome.passed and not outcome.unserved, str(outcome)
    assert not notes(model)


def every_projection(model: nn.Module, but: set[str]) -> bool:
    """All linear layers but the named are served, and none was ever left to PEFT."""
    rows = adapter_rows(model)
    base = (path.removesuffix(".base_layer") for path, m in model.named_modules() if isinstance(m, nn.Linear))
    linear = {path for path in base if "lora_" not in path and path.rpartition(".")[2] not in but}
    linear = {path for path in linear if not any(name in path for name in but)}
    return {row.path for row in rows if row.op and "by PEFT" not in row.note} == linear and max(
        Counter(r.path for r in rows).values()
    ) == 1
