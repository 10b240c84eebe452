"""Whole models with large vocabularies: loss and gradients without logits beside those with, time and peak memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastpeft.bench.recorder import Recorder

order = 45
time_limit_s = 240
needs = ("peft",)

FAMILIES = ("llama", "llama with LoRA on the head", "llama with a trained head", "gemma2", "bart", "llama in fp32")


def run(recorder: Recorder, depth: str, small: bool = False) -> None:
    recorder.run_checks("loss", ((name, partial(_case, recorder, name, depth, small)) for name in FAMILIES))


dry_run = partial(run, small=True)


def _case(recorder: Recorder, name: str, depth: str, small: bool) -> dict[str, float]:
    import copy

    import torch

    import fastpeft
    from fastpeft.bench.memory import peak_of_step
    from fastpeft.bench.timer import interleaved, ratio

    device, dtype = recorder.device, torch.float32 if name.endswith("fp32") else torch.bfloat16
    model = fastpeft.accelerate(_model(name, small).to(device, dtype).train(), loss=False)
    inputs = _batch(model, small, device)
    exact = _step(copy.deepcopy(model).double(), inputs)
    lazy = fastpeft.accelerate(copy.deepcopy(model))
    _step(lazy, inputs)  # finds the siblings
    theirs, ours = _step(model, inputs), _step(lazy, inputs)
    (row,) = [row for row in fastpeft.report(lazy).rows if row.kind == "loss"]
    assert row.op and not row.note, f"not served: {row}"
    eps = torch.finfo(dtype).eps
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        error, budget = _error(mine, truth), 2 * _error(other, truth) + 4 * eps  # one number can be close by chance
        assert error <= budget, f"error {error:.2e}, budget {budget:.2e}, of {tuple(truth.shape)}"
    steps = {"fastpeft": partial(_step, lazy, inputs), "with logits": partial(_step, model, inputs)}
    rounds = 2 if device == "cpu" else {"quick": 5, "default": 10, "full": 30}[depth]
    samples = interleaved(steps, rounds, device=device)
    for peer, taken in samples.items():
        recorder.add(case=name, op="loss", peer=peer, metric="step time", unit="ms", samples=taken)
    figures = {"time_ratio": ratio(samples, "fastpeft", "with logits")}
    if device == "cuda":
        figures |= {f"peak_{peer.replace(' ', '_')}_mib": peak_of_step(step) / 2**20 for peer, step in steps.items()}
    return figures


def _step(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def _error(value: Any, truth: Any) -> float:
    """Relative, in norm."""
    distance: float = (value.double() - truth.double()).norm().item()
    return distance / (truth.double().norm().item() or 1.0)


def _model(name: str, small: bool) -> Any:
    import torch
    import transformers as t
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    words, hidden = (12_000, 64) if small else (128_256, 2048)  # fewer logits than these are made on a CPU
    decoder = {
        "vocab_size": words, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2,
        "num_attention_heads": hidden // 64 or 1, "num_key_value_heads": max(1, hidden // 256), "head_dim": 64,
    }  # fmt: skip
    base: Any
    if name.startswith("llama"):
        base = t.LlamaForCausalLM(t.LlamaConfig(**decoder))
    elif name == "gemma2":
        base = t.Gemma2ForCausalLM(t.Gemma2Config(**decoder, attn_implementation="eager"))
    else:
        base = t.BartForConditionalGeneration(
            t.BartConfig(
                vocab_size=words, d_model=hidden, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=2 * hidden,
                decoder_ffn_dim=2 * hidden, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
                max_position_embeddings=2048, forced_eos_token_id=None,
            )
        )  # fmt: skip
        torch.nn.init.normal_(base.final_logits_bias)
    targets = ["q_proj", "v_proj", "lm_head"] if "LoRA on the head" in name else ["q_proj", "v_proj"]
    model = get_peft_model(base, LoraConfig(r=16, target_modules=targets, init_lora_weights=False))
    if "trained head" in name:
        base.lm_head.weight.requires_grad_(True)
    return model


def _batch(model: Any, small: bool, device: str) -> dict[str, Any]:
    import torch

    words: int = model.config.vocab_size
    rows, tokens = (2, 24) if small else (4, 1024)
    ids = torch.randint(3, words, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[0, : tokens // 2] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}
