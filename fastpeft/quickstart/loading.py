"""The base model, and the adapter on it: what a user's own script would say."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastpeft.errors import UserError

from .settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .packing import Blocks


@dataclass(frozen=True)
class Loaded:
    """What a task works with; the texts are packed."""

    device: torch.device
    dtype: torch.dtype
    model: Any
    blocks: Blocks
    held_out: Blocks


def pick_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What is computed with.

    Args:
        name: "auto", or a floating dtype's name.
        device: float32 is a CPU's "auto"; a GPU's is bfloat16, or float16 where bfloat16 would be emulated.

    Raises:
        UserError: float16 on a CPU.
    """
    import torch

    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype: expected float32 or bfloat16 on a CPU, got float16")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_tokenizer(settings: Settings) -> Any:
    """The model's tokenizer. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: no tokenizer could be loaded from {settings.model}: {error}") from error


def load_base(settings: Settings, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen base model, in evaluation mode.

    Raises:
        UserError: it cannot be loaded, is no decoder, or its positions do not reach --sequence-length.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {settings.model} could not be loaded: {error}") from error
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    saved = config.architectures or [wanted]
    if wanted not in saved or config.is_encoder_decoder:  # an encoder loads too, but each token would see the next
        raise UserError(f"--model: expected a decoder (causal language model), got {saved[0] or config.model_type}")
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and settings.sequence_length > longest:
        message = f"expected at most {longest}, the model's last position, got {settings.sequence_length}"
        raise UserError(f"--sequence-length: {message}")
    options: dict[str, Any] = {"dtype": dtype}
    if settings.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if device.type == "cuda":
        options["device_map"] = {"": device}
    try:
        return AutoModelForCausalLM.from_pretrained(settings.model, **options)
    except OSError as error:
        raise UserError(f"--model: {settings.model} could not be loaded: {error}") from error


def attach_adapter(base: Any, settings: Settings) -> Any:
    """A PEFT model with a fresh LoRA on every projection; the same for the same seed.

    Dropout is 0: PEFT and fastpeft draw it differently, and the two runs are to be compared step by step.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    return get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
    )


def forbid_cpu_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights for inference on CPUs with AVX512-BF16.

    It would do so in place, in the first forward in evaluation mode, to a form that its backward does not know:
    training afterwards loses the base's input gradients without a word. `fastpeft.accelerate` forbids it by itself;
    plain PEFT needs this to be evaluated before it is trained.
    """
    from ..integrations import bitsandbytes

    for module in model.modules():
        bitsandbytes.forbid_cpu_packing(module)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """As Trainer computes with its `bf16` or `fp16`; nothing for float32."""
    import torch

    return torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)
