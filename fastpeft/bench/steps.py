"""A training step of plain PEFT beside the accelerated one: same weights, same batch, same run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .busy import Busy, busy
from .kept import bytes_kept, bytes_saved
from .memory import peak_of_step
from .timer import interleaved


@dataclass(frozen=True)
class StepCase:
    """A model family in a size, a method and dtypes.

    Attributes:
        family: "llama", "bert", "t5" or "moe", built from a configuration with random weights. "moe" is Qwen3-MoE: 16
            experts of which a token takes 2, half as wide as the MLP of "llama", LoRA on their stacked parameters too;
            "moe-128" in Qwen3-30B-A3B's proportions, whose width is 2048: 128 experts, 8 a token.
        method: "lora" (dense base) or "qlora" (NF4, nested), "dora" or "qdora"; "loha", "lokr" or "vera".
        dtype: of the base's values and products; adapters are fp32, as PEFT makes them.
        autocast: run the step under bf16 autocast.
        dropout: LoRA's.
        checkpointing: recompute every layer in backward.
        compiled: by torch.compile in this mode; "" for not.
        words: of the vocabulary.
    """

    family: str
    method: str
    dtype: torch.dtype
    hidden: int = 512
    layers: int = 4
    rows: int = 2
    tokens: int = 256
    rank: int = 16
    autocast: bool = False
    dropout: float = 0.0
    checkpointing: bool = False
    compiled: str = ""
    words: int = 1000

    @property
    def name(self) -> str:
        parts = [
            self.family,
            self.method,
            str(self.dtype)[6:],
            f"{self.layers}x{self.hidden}",
            f"{self.rows}x{self.tokens} tokens",
        ]
        parts += [f"{self.words} words"] * (self.words != 1000)
        parts += [f"r={self.rank}"] + ["autocast"] * self.autocast + [f"dropout {self.dropout}"] * (self.dropout > 0)
        parts += ["checkpointing"] * self.checkpointing + ["torch.compile"] * bool(self.compiled)
        return " ".join(parts + [self.compiled] * (self.compiled not in ("", "default")))


@dataclass(frozen=True)
class StepResult:
    """Milliseconds a step, in rounds of the same order; bytes that one forward keeps for backward; `Sides.peak`.

    busy: of a GPU in such a step, not compiled.
    """

    case: StepCase
    samples: dict[str, list[float]]
    kept: dict[str, int]
    peak: dict[str, int]
    busy: dict[str, Busy]


class Sides(NamedTuple):
    """What `side_by_side` measured, and the accelerated model as it is afterwards.

    peak: bytes that a step takes at the most beside the model, gradients of adapters among them.
    """

    samples: dict[str, list[float]]
    kept: dict[str, int]
    peak: dict[str, int]
    accelerated: nn.Module


def measure(case: StepCase, rounds: int, device: str = "cpu") -> StepResult:
    """`side_by_side` of the case's model and batch."""
    batch = make_batch(case, device)
    loss = partial(step_loss, batch=batch, case=case, device=device)
    model = build(case, device)
    sides = side_by_side(model, loss, rounds, device, case.compiled)
    models = {"peft": model, "fastpeft": sides.accelerated} if device == "cuda" and not case.compiled else {}
    at_work = {name: busy(partial(train, each, loss)) for name, each in models.items()}
    return StepResult(case, sides.samples, sides.kept, sides.peak, at_work)


def side_by_side(
    model: nn.Module,
    loss: Callable[[Any], torch.Tensor],
    rounds: int,
    device: str = "cpu",
    compiled: str = "",
    peak_on_cpu: bool = False,
) -> Sides:
    """PEFT twice (its own spread shows in the ratio of the two) and fastpeft once, in every round.

    Args:
        model: of PEFT; an accelerated copy is measured beside it.
        loss: of one forward of the model it is given.
        rounds, device: as `interleaved` takes them.
        compiled: by torch.compile in this mode; "" for not.
        peak_on_cpu: measure `Sides.peak` there too, by the profiler.
    """
    import fastpeft
    from fastpeft_kernels.native.extension import group_extension

    group_extension(wait=True)
    models = {"peft": model, "fastpeft": fastpeft.accelerate(copy.deepcopy(model))}
    loss(models["fastpeft"])  # finds the siblings
    called: dict[str, Any] = {
        name: torch.compile(each, mode=compiled) if compiled else each for name, each in models.items()
    }
    steps = {name: partial(train, each, loss) for name, each in called.items()}
    steps["peft again"] = steps["peft"]
    samples = interleaved(steps, rounds, device=device)
    count = bytes_saved if compiled else bytes_kept
    kept = {name: count(models[name], partial(loss, each)) for name, each in called.items()}
    with_peak = called if device == "cuda" or peak_on_cpu else {}
    peak = {name: peak_of_step(steps[name], device) for name in with_peak}
    return Sides(samples, kept, peak, models["fastpeft"])


def build(case: StepCase, device: str) -> nn.Module:
    """The PEFT model, training mode, adapters not zero."""
    torch.manual_seed(0)
    with torch.device(device):  # random numbers are drawn faster on a GPU
        base = base_model(case)
    return adapt(base, case, device)


def adapt(base: nn.Module, case: StepCase, device: str) -> nn.Module:
    """`build` over another base than the case's own."""
    from peft import get_peft_model

    model = base.to(device, case.dtype)
    if case.method in ("qlora", "qdora"):
        _to_nf4(model, case.dtype)
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    peft_model = get_peft_model(model, _config(case, targets(model))).train()
    with torch.no_grad():  # updates as large as the weights make a random T5 chaotic: no rounding would be small there
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lambda_b" in name:
                parameter.mul_(0.1)
    if case.checkpointing:
        peft_model.enable_input_require_grads()
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft_model


def _config(case: StepCase, targets: list[str]) -> Any:
    import peft

    if case.method in ("loha", "lokr"):
        make = peft.LoHaConfig if case.method == "loha" else peft.LoKrConfig
        return make(r=case.rank, alpha=2 * case.rank, target_modules=targets, init_weights=False)
    if case.method == "vera":
        return peft.VeraConfig(r=case.rank, vera_dropout=case.dropout, target_modules=targets, init_weights=False)
    return peft.LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        target_modules=targets,
        use_dora=case.method in ("dora", "qdora"),
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if case.family.startswith("moe") else None,
        init_lora_weights=False,
    )


def make_batch(case: StepCase, device: str) -> dict[str, Any]:
    ids = torch.randint(0, case.words, (case.rows, case.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    if case.family == "bert":
        return {"input_ids": ids, "labels": ids[:, 0] % 2}
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def train(model: Any, loss: Callable[[Any], torch.Tensor]) -> None:
    """One step, of which no gradient is left."""
    loss(model).backward()
    model.zero_grad(set_to_none=True)


def step_loss(model: Any, batch: dict[str, Any], case: StepCase, device: str) -> torch.Tensor:
    """Of one forward, under the case's autocast."""
    with torch.autocast(device, torch.bfloat16, enabled=case.autocast):
        return model(**batch).loss  # type: ignore[no-any-return]


def base_model(case: StepCase) -> nn.Module:
    """Random weights in fp32, without adapters. Raises ValueError for an unknown family."""
    import transformers as t

    h, n, inner = case.hidden, case.layers, case.hidden * 8 // 3 // 64 * 64
    positions = max(case.tokens, 512)
    if case.family == "llama":
        return t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=case.words, hidden_size=h, intermediate_size=inner, num_hidden_layers=n,
                num_attention_heads=h // 64, num_key_value_heads=max(1, h // 256), max_position_embeddings=positions,
            )
        )  # fmt: skip
    if case.family == "bert":
        return t.BertForSequenceClassification(
            t.BertConfig(
                vocab_size=case.words, hidden_size=h, intermediate_size=4 * h, num_hidden_layers=n,
                num_attention_heads=h // 64, max_position_embeddings=positions,
            )
        )  # fmt: skip
    if case.family == "t5":
        return t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=case.words, d_model=h, d_kv=64, d_ff=inner, num_layers=n, num_heads=h // 64,
                feed_forward_proj="gated-gelu", decoder_start_token_id=0,
            )
        )  # fmt: skip
    if case.family in ("moe", "moe-128"):
        many = case.family == "moe-128"
        return t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(
                vocab_size=case.words, hidden_size=h, moe_intermediate_size=h * 3 // 8 if many else inner // 2,
                num_hidden_layers=n, num_attention_heads=h // 64,
                num_key_value_heads=max(1, h // (512 if many else 256)), head_dim=128 if many else 64,
                num_experts=128 if many else 16, num_experts_per_tok=8 if many else 2,
                max_position_embeddings=positions,
            )
        )  # fmt: skip
    raise ValueError(f"family: expected 'llama', 'bert', 't5', 'moe' or 'moe-128', got {case.family!r}")


def targets(model: nn.Module) -> list[str]:
    """Every projection inside the layers, by its last name; no head, no classifier, no pooler."""
    inside = {name.rpartition(".")[2] for name, module in projections(model)}
    return sorted(inside)


def projections(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path, module) of every linear layer inside the model's layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split(".")):
            yield name, module


def _to_nf4(model: nn.Module, compute_dtype: torch.dtype) -> None:
    kept_wide = tuple(
        getattr(model, "_keep_in_fp32_modules", None) or ()
    )  # as transformers' own quantizer does: T5's wo
    for name, module in list(projections(model)):
        if name.endswith(kept_wide):
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nf4_linear(module, compute_dtype))


def nf4_linear(module: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' Linear4bit of the same values, frozen: NF4 with nested scales, on the same device."""
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        module.bias is not None,
        compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    new.weight = bnb.nn.Params4bit(
        module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
    )
    new.bias = module.bias
    new.support_avx512bf16_for_cpu = False  # else an eval forward on such a CPU rearranges the weights in place
    return new.to(module.weight.device)
