"""Parameter-efficient fine-tuning of Transformers, faster and in less memory, with the same numbers.

Importing fastpeft loads neither torch nor Triton nor transformers: a public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastpeft_kernels import __version__

if TYPE_CHECKING:
    from .applying import accelerate, restore
    from .fp8_reporting import fp8_report
    from .integrations.attention import register_attention
    from .integrations.peft import mixed_batch
    from .integrations.trainer import retry_steps
    from .layers.custom_modules import lora_config
    from .memory.exhaustion.explaining import explain_out_of_memory
    from .memory.exhaustion.retrying import StepRetry
    from .memory.packed.loading import load
    from .memory.plan.planning import plan
    from .memory.policy import LayerPolicy, MemoryPolicy
    from .noticing.watch import watch
    from .reporting import report
    from .tuning import tune, use_tuned
    from .verification import verify

# A module never has the name of a public function: importing it would hide the function.
_HOME = {
    "accelerate": "applying",
    "restore": "applying",
    "load": "memory.packed.loading",
    "LayerPolicy": "memory.policy",
    "MemoryPolicy": "memory.policy",
    "report": "reporting",
    "fp8_report": "fp8_reporting",
    "verify": "verification",
    "watch": "noticing.watch",
    "tune": "tuning",
    "use_tuned": "tuning",
    "lora_config": "layers.custom_modules",
    "mixed_batch": "integrations.peft",
    "plan": "memory.plan.planning",
    "explain_out_of_memory": "memory.exhaustion.explaining",
    "StepRetry": "memory.exhaustion.retrying",
    "retry_steps": "integrations.trainer",
    "register_attention": "integrations.attention",
}

__all__ = [
    "LayerPolicy",
    "MemoryPolicy",
    "StepRetry",
    "__version__",
    "accelerate",
    "explain_out_of_memory",
    "fp8_report",
    "load",
    "lora_config",
    "mixed_batch",
    "plan",
    "register_attention",
    "report",
    "restore",
    "retry_steps",
    "tune",
    "use_tuned",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
