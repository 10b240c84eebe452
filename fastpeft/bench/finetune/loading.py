"""The model of a case, as a user's script would load it, and its adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import nn

from fastpeft.bench.left_out import NotHereError
from fastpeft.bench.steps import projections, targets

from .case import WIDER, FinetuneCase
from .peers import Peer
from .sizes import CAUSAL, CLASSES, SEQ2SEQ, config_of, sizes_of, task_of

_CLASSES = {
    CAUSAL: "AutoModelForCausalLM",
    CLASSES: "AutoModelForSequenceClassification",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
}
_DROPS = ("_pdrop", "layerdrop")
_PEFT_TASKS = {CAUSAL: "CAUSAL_LM", CLASSES: "SEQ_CLS", SEQ2SEQ: "SEQ_2_SEQ_LM"}


class Source(NamedTuple):
    """Where a case's weights are: a folder or a name on the hub, what it is for, and how many words it knows."""

    path: str
    task: str
    words: int


def find_source(case: FinetuneCase, folder: Path) -> Source:
    """The case's model, saved in the folder where it was made here.

    One of `MODELS` gets random weights. Others are saved anew where they are stored in another dtype, so that the exact
    run too reads what the others read, and where the head of a classifier is new.
    """
    from transformers import AutoConfig

    dtype = getattr(torch, case.dtype)
    if case.published:
        sizes = sizes_of(case.model, case.scale, case.layers)
        task, config = task_of(sizes.kind), without_dropout(config_of(sizes, case.tokens))
        make = partial(_class(task).from_config, config, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(case.model)
        causal = any("CausalLM" in name for name in config.architectures or ())
        task = SEQ2SEQ if config.is_encoder_decoder else CAUSAL if causal else CLASSES
        make = partial(_class(task).from_pretrained, case.model, dtype=dtype)
    words = config.get_text_config().vocab_size
    if not case.published and task != CLASSES and config.dtype == dtype:
        return Source(case.model, task, words)
    torch.manual_seed(0)
    _made(make, case).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Source(str(folder), task, words)


def _made(make: Callable[[], Any], case: FinetuneCase) -> Any:
    if not case.published:
        return make()
    try:
        with torch.device(case.device):  # random numbers are drawn faster on a GPU
            return make()
    except torch.OutOfMemoryError:  # it may fit in 4 bits
        return make()


def without_dropout(config: Any) -> Any:
    """The configuration, in which nothing is dropped out any more."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and (key.endswith(_DROPS) or "dropout" in key):
            setattr(config, key, 0.0)
    return config


def tokenizer() -> Any:
    """One with the special tokens alone: trainers ask for it, rows hold ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: i for i, word in enumerate(special.values())}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), **special)


def load(case: FinetuneCase, source: Source, peer: Peer) -> Any:
    """The PEFT model of a peer, in training mode; the same adapters for each."""
    model = _unsloth(case, source) if peer.unsloth else _peft(case, source, peer)
    _seed_adapters(model)
    if peer.moved:
        move_by_a_rounding(model)
    if peer.switches is not None:
        import fastpeft

        fastpeft.accelerate(model, **dict(peer.switches))  # type: ignore[arg-type]
    return model


def _peft(case: FinetuneCase, source: Source, peer: Peer) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    name = WIDER[case.dtype] if peer.exact else case.dtype
    exact64 = name == "float64"
    dtype = torch.float32 if exact64 else getattr(torch, name)
    given: dict[str, Any] = {"dtype": dtype}
    if case.method == "qlora":
        given["quantization_config"] = _nf4(dtype)
    if case.method == "qlora" or case.device == "cuda":
        given["device_map"] = {"": 0 if case.device == "cuda" else "cpu"}
    config = without_dropout(AutoConfig.from_pretrained(source.path))
    base = _class(source.task).from_pretrained(source.path, config=config, **given)
    if exact64 and case.method == "qlora":
        _decode(base)
    base.config.use_cache = False
    adapter = LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        target_modules=targets(base),
        task_type=_PEFT_TASKS[source.task],
    )
    model = get_peft_model(base, adapter).train()
    if peer.liger:
        _check_liger(base)
    return model.double() if exact64 else model


def _unsloth(case: FinetuneCase, source: Source) -> Any:
    """As its own notebooks do."""
    try:
        from unsloth import FastLanguageModel
    except Exception as error:  # it refuses versions and machines by exceptions of many kinds
        raise NotHereError(f"unsloth does not import: {type(error).__name__}: {error}") from error
    checkpointing = "unsloth" if case.checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=source.path,
        max_seq_length=case.tokens,
        dtype=getattr(torch, case.dtype),
        load_in_4bit=case.method == "qlora",
        use_gradient_checkpointing=checkpointing,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=0.0,
        target_modules=targets(model),
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=3407,
    )


def _seed_adapters(model: nn.Module) -> None:
    """A of each layer by its name, drawn as PEFT does; B is zero already."""
    generator = torch.Generator()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                generator.manual_seed(crc32(name.encode()))
                bound = parameter.shape[1] ** -0.5  # Kaiming's, with a slope of √5
                parameter.copy_(torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound))


def move_by_a_rounding(model: nn.Module) -> None:
    """Each element of the trained parameters up or down, by chance; zeros stay."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + signs.to(parameter) * torch.finfo(parameter.dtype).eps)


def _class(task: str) -> Any:
    import transformers

    return getattr(transformers, _CLASSES[task])


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _decode(model: nn.Module) -> None:
    """Dense layers of the same values in place of 4-bit ones, which know no float64."""
    from bitsandbytes.functional import dequantize_4bit

    for path, layer in list(projections(model)):
        state: Any = getattr(layer.weight, "quant_state", None)
        if state is None:
            continue
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(dequantize_4bit(layer.weight.data, state), requires_grad=False)
        dense.bias = layer.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    model.is_loaded_in_4bit = model.is_quantized = False  # type: ignore[assignment]
    del model.hf_quantizer, model.config.quantization_config  # type: ignore[union-attr]


def _check_liger(model: Any) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if (kind := model.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise NotHereError(f"has no kernels for {kind} models")
