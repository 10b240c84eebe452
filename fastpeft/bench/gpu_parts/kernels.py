"""Every kernel, configuration and dtype against plain PyTorch and the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastpeft.bench.listing import list_checks
from fastpeft.bench.recorder import Check, Recorder

order = 10
time_limit_s = 480
parallel = True


def run(recorder: Recorder, depth: str) -> None:
    recorder.run_suites({op: checks() for op, checks in _suites().items()})


def dry_run(recorder: Recorder, depth: str) -> None:
    list_checks(recorder, _suites())


def _suites() -> dict[str, Callable[[], Iterable[Check]]]:
    from fastpeft_kernels.activation import gpu as activation
    from fastpeft_kernels.attention import gpu as attention
    from fastpeft_kernels.attention import gpu_candidates as attention_candidates
    from fastpeft_kernels.attention import gpu_op as attention_op
    from fastpeft_kernels.experts import gpu as experts
    from fastpeft_kernels.fp8 import gpu as fp8
    from fastpeft_kernels.lora import gpu as lora
    from fastpeft_kernels.lora import gpu_other as lora_other
    from fastpeft_kernels.loss import gpu as loss
    from fastpeft_kernels.lycoris import gpu as lycoris
    from fastpeft_kernels.mlp import gpu as mlp
    from fastpeft_kernels.norm import gpu as norm
    from fastpeft_kernels.quant import gpu as quant
    from fastpeft_kernels.rope import gpu as rope
    from fastpeft_kernels.tokens import gpu as tokens
    from fastpeft_kernels.weights import gpu_decode as weights

    suites = {"attention": attention, "fp8": fp8, "quant": quant, "activation": activation, "lora": lora, "mlp": mlp}
    suites |= {
        "experts": experts,
        "attention_op": attention_op,
        "attention_candidates": attention_candidates,
        "lora_other": lora_other,
        "loss": loss,
        "lycoris": lycoris,
        "norm": norm,
        "rope": rope,
        "tokens": tokens,
        "weights": weights,
    }
    return {op: suite.checks for op, suite in suites.items()}
