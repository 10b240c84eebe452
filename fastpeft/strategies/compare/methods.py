"""The methods that can be compared: what each trains of a base model, and with which learning rates it is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainerCallback

from fastpeft.config import LoraSection
from fastpeft.models.adapters import attach_adapter, targets
from fastpeft.models.tasks import PEFT_TASKS

VIRTUAL_TOKENS = 20
"""Of prompt and prefix tuning; the papers take 5 to 100."""
HEADLESS = {
    task: "the checkpoint has its head, so nothing would be trained"
    for task in ("causal-lm", "seq2seq-lm", "masked-lm")
}
UNMASKED = {"masked-lm": "PEFT knows no such task"}
UNTAGGED = UNMASKED | {"token-classification": "PEFT has the virtual tokens tagged too, for which rows have no tags"}
HEADS = ("classifier", "score")
"""Names of classifiers, which PEFT trains whole beside any adapter, and so do we without one."""


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Attributes:
        lora: rank, scale, dropout and targets of those of LoRA's kind; `modules_to_save` are trained whole by every
            method: what the checkpoint has no values for.
        task: of the model.
        steps: that will be trained.
        seed: of fresh values.
    """

    lora: LoraSection
    task: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        title: as papers write it.
        low, high: ends of the learning rates tried, which are spaced evenly on a log scale.
        attach: from the frozen base, makes what is trained.
        trains: in words, beside the classifier.
        quantization: storage of the base's weights.
        optimizer: from the model, an optimizer's class and its options; None for the trainer's own groups.
        callback: from the model, of the trainer; None for none.
        whole: whether modules beside PEFT's HEADS can be trained too, and saved with the adapter.
        refuses: by task that it does not serve, the reason.
    """

    title: str
    low: float
    high: float
    attach: Callable[[Any, Setting], Any]
    trains: str
    quantization: str = "none"
    optimizer: Callable[[Any, Any, dict[str, Any]], Any] | None = None
    callback: Callable[[Any], TrainerCallback] | None = None
    whole: bool = True
    refuses: dict[str, str] = field(default_factory=dict)

    def rates(self, count: int) -> list[float]:
        """`count` learning rates from low to high; for one, their geometric mean. Three significant digits."""
        share = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
        return [float(f"{self.low ** (1 - s) * self.high**s:.3g}") for s in share]

    def serves_not(self, task: str) -> str | None:
        """Why it cannot be tried for a task; else None."""
        reason = self.refuses.get(task)
        return None if reason is None else f"{self.title} does not serve {task}: {reason}"

    def why_not(self, setting: Setting) -> str | None:
        """Why it cannot be tried on this model, as far as that can be told before it is; else None."""
        if not self.whole and (more := [name for name in setting.lora.modules_to_save if name not in HEADS]):
            return f"PEFT's {self.title} trains no module whole, and the checkpoint has no values for {', '.join(more)}"
        return None


def _unfrozen(trained: Callable[[str, Any], bool]) -> Callable[[Any, Setting], Any]:
    """No adapter: the parameters for which `trained(name, parameter)`, and the heads."""

    def attach(base: Any, setting: Setting) -> Any:
        whole = (*HEADS, *setting.lora.modules_to_save)
        for name, parameter in base.named_parameters():
            head = any(f".{module}." in f".{name}" for module in whole)
            parameter.requires_grad_(head or trained(name, parameter))
        return base

    return attach


def _lora(**changes: Any) -> Callable[[Any, Setting], Any]:
    """LoRA with `changes`; what else makes it another method is off, whatever the configuration says."""
    given: dict[str, Any] = {
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "bias": "none",
    } | changes
    return lambda base, setting: attach_adapter(base, replace(setting.lora, **given), setting.task, setting.seed)


def _peft(config_class: str, options: Callable[[Any, Setting], dict[str, Any]]) -> Callable[[Any, Setting], Any]:
    """A method of PEFT beside LoRA; `options` of its configuration, from the base and the setting."""

    def attach(base: Any, setting: Setting) -> Any:
        import peft
        import torch

        given = {"task_type": PEFT_TASKS.get(setting.task), **options(base, setting)}
        torch.manual_seed(setting.seed)
        return peft.get_peft_model(base, getattr(peft, config_class)(**given))  # type: ignore[no-untyped-call]

    return attach


def _saved(setting: Setting) -> dict[str, Any]:
    """A tagger's head by its names too, since PEFT would take it for one of `all-linear`."""
    names = [*setting.lora.modules_to_save, *(HEADS if setting.task == "token-classification" else ())]
    return {"modules_to_save": names or None}


def _norms(base: Any, setting: Setting) -> dict[str, Any]:
    """PEFT knows the norms of four families; here they are told by their class and their weight, a vector."""
    found = [
        name
        for name, module in base.named_modules()
        if "norm" in type(module).__name__.lower() and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    ]
    return _saved(setting) | {"target_modules": found}


def _adalora(base: Any, setting: Setting) -> dict[str, Any]:
    """Half as much rank again, cut down to the others' between a tenth and seven tenths of the steps."""
    section = setting.lora
    return _saved(setting) | {
        "init_r": max(section.r + 1, section.r * 3 // 2),
        "target_r": section.r,
        "lora_alpha": section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": targets(section),
        "total_step": setting.steps,
        "tinit": setting.steps // 10,
        "tfinal": setting.steps * 3 // 10,
    }


def _vera(base: Any, setting: Setting) -> dict[str, Any]:
    """Its rank costs one number each, so the paper takes 256 and more."""
    return _saved(setting) | {"r": 256, "target_modules": targets(setting.lora), "projection_prng_key": setting.seed}


def _virtual(**options: Any) -> Callable[[Any, Setting], dict[str, Any]]:
    return lambda base, setting: {"num_virtual_tokens": VIRTUAL_TOKENS, **options}


def _prefix(base: Any, setting: Setting) -> dict[str, Any]:
    width = base.config.get_text_config().hidden_size
    return {"num_virtual_tokens": VIRTUAL_TOKENS, "prefix_projection": True, "encoder_hidden_size": width}


def _loraplus(model: Any, kind: Any, options: dict[str, Any]) -> Any:
    """16 times the rate for the B matrices, the paper's ratio; the rate that is searched is A's."""
    from peft.optimizers import create_loraplus_optimizer

    given = {"loraplus_lr_ratio": 16.0, "loraplus_weight_decay": options["weight_decay"]}
    return create_loraplus_optimizer(model, kind, **given, **options)


class _Reallocate(TrainerCallback):
    """AdaLoRA moves rank by the gradients of a step, between the optimizer's step and their end."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._model.base_model.update_and_allocate(state.global_step + 1)


METHODS = {
    "full": Method("full fine-tuning", 4e-5, 1e-3, _unfrozen(lambda name, parameter: True), "everything"),
    "head": Method("head only", 1e-3, 3e-2, _unfrozen(lambda name, parameter: False), "nothing", refuses=HEADLESS),
    "bitfit": Method("BitFit", 4e-4, 1e-2, _unfrozen(lambda name, parameter: name.endswith("bias")), "the biases"),
    "layernorm": Method("LayerNorm tuning", 4e-4, 1e-2, _peft("LNTuningConfig", _norms), "weight and bias of norms"),
    "lora": Method("LoRA", 2e-4, 5e-3, _lora(), "B A beside each projection"),
    "qlora": Method("QLoRA", 2e-4, 5e-3, _lora(), "as LoRA, over a base in 4 bits", quantization="nf4"),
    "rslora": Method("rsLoRA", 1e-4, 2.5e-3, _lora(use_rslora=True), "as LoRA, scaled by alpha / sqrt(r)"),
    "loraplus": Method("LoRA+", 1e-4, 2.5e-3, _lora(), "as LoRA, B with 16 times the rate", optimizer=_loraplus),
    "dora": Method("DoRA", 2e-4, 5e-3, _lora(use_dora=True), "as LoRA, and a magnitude for each output"),
    "pissa": Method(
        "PiSSA", 1e-4, 2.5e-3, _lora(init_lora_weights="pissa"), "as LoRA, from each weight's largest singular values"
    ),
    "adalora": Method(
        "AdaLoRA",
        4e-4,
        1e-2,
        _peft("AdaLoraConfig", _adalora),
        "P E Q; rank moves between layers",
        callback=_Reallocate,
    ),
    "vera": Method("VeRA", 2e-3, 5e-2, _peft("VeraConfig", _vera), "scales of random matrices that all layers share"),
    "ia3": Method(
        "(IA)³", 2e-3, 5e-2, _peft("IA3Config", lambda base, s: _saved(s)), "scales of keys, values, feed-forward"
    ),
    "prompt": Method(
        "prompt tuning",
        4e-3,
        1e-1,
        _peft("PromptTuningConfig", _virtual()),
        "virtual tokens before the text",
        whole=False,
        refuses=UNTAGGED,
    ),
    "p-tuning": Method(
        "P-tuning",
        4e-4,
        1e-2,
        _peft("PromptEncoderConfig", _virtual()),
        "virtual tokens, through an MLP",
        whole=False,
        refuses=UNTAGGED,
    ),
    "prefix": Method(
        "prefix tuning",
        4e-4,
        1e-2,
        _peft("PrefixTuningConfig", _prefix),
        "keys, values before each layer's, through an MLP",
        whole=False,
        refuses=UNMASKED,
    ),
    "p-tuning-v2": Method(
        "P-tuning v2",
        2e-3,
        5e-2,
        _peft("PrefixTuningConfig", _virtual()),
        "keys, values before each layer's",
        whole=False,
        refuses=UNMASKED,
    ),
}
"""By name. Bottleneck adapters (Houlsby, Pfeiffer) are not among them: PEFT has none."""
