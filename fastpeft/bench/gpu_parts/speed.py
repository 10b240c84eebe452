"""Times of the kernels by themselves, beside what they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from fastpeft.bench.listing import list_checks
from fastpeft.bench.recorder import Check, Recorder

order = 80
time_limit_s = 300


def run(recorder: Recorder, depth: str) -> None:
    recorder.run_suites({op: checks() for op, checks in _suites(depth).items()})


def dry_run(recorder: Recorder, depth: str) -> None:
    list_checks(recorder, _suites(depth))


def _suites(depth: str) -> dict[str, Callable[[], Iterable[Check]]]:
    from fastpeft_kernels.activation import gpu_speed as activation
    from fastpeft_kernels.attention import gpu_features as attention_features
    from fastpeft_kernels.attention import gpu_op as attention_op
    from fastpeft_kernels.attention import gpu_speed as attention
    from fastpeft_kernels.fp8 import gpu_speed as fp8
    from fastpeft_kernels.lora import gpu_speed as lora
    from fastpeft_kernels.loss import gpu_distillation_speed as distillation
    from fastpeft_kernels.loss import gpu_speed as loss
    from fastpeft_kernels.mlp import gpu_speed as mlp
    from fastpeft_kernels.norm import gpu_speed as norm
    from fastpeft_kernels.rope import gpu_speed as rope

    families = {"attention_features": attention_features, "attention_op": attention_op, "fp8": fp8}
    families |= {"activation": activation, "lora": lora, "mlp": mlp, "loss": loss, "norm": norm, "rope": rope}
    families |= {"distillation": distillation}
    suites = {op: family.speed_checks for op, family in families.items()}
    return {"attention": partial(attention.speed_checks, depth), **suites}
