"""The base model and its tokenizer."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastpeft
from fastpeft.config import FastpeftConfig, ModelSection
from fastpeft.errors import UserError
from fastpeft.hints import nearest
from fastpeft.hub import unreachable
from fastpeft.integrations.transformers import ATTENTION

from .tasks import HEADS, auto_class
from .untrusted import check_base, check_generation

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
USUAL_LENGTH = 1024


def checked_name(name: str, key: str = "model.name") -> str:
    """A model's name: the whole path of a folder, or an ID on the hub as it is.

    Args:
        name: as the user gave it.
        key: what the user calls it.

    Raises:
        UserError: it is empty, a folder of something else, or neither a folder nor an ID.
    """
    if not name:
        raise UserError(f"{key}: expected a model's folder or its ID on the hub, got nothing")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise UserError(f"{key}: expected a base model, got an adapter: {name}")
            raise UserError(f"{key}: expected a folder with a config.json, got {name}")
        return str(folder.resolve())
    if folder.exists() or not HUB_ID.fullmatch(name):
        near = nearest(folder.name, _names_in(folder.parent))
        hint = f"; did you mean {folder.with_name(near)}?" if near else ""
        raise UserError(f"{key}: expected a model's folder or its ID on the hub, got {name!r}, which is neither{hint}")
    return name


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def quantization_of(config: FastpeftConfig) -> str:
    """The storage of the frozen weights, which `method` decides where the model's section does not.

    Raises:
        UserError: method qlora with weights that are not in 4 bits.
    """
    given = config.model.quantization
    if config.method == "qlora" and given not in (None, "nf4", "fp4"):
        raise UserError(f"model.quantization: expected 'nf4' or 'fp4' for method qlora, got {given!r}")
    return given or ("nf4" if config.method == "qlora" else "none")


def load_config(model: ModelSection, key: str = "model.name") -> Any:
    """transformers' configuration of the model. Raises UserError where it cannot be had."""
    from transformers import AutoConfig

    name = checked_name(model.name, key)
    if model.revision is not None and Path(name).is_dir():
        raise UserError(f"model.revision: expected null for a folder, got {model.revision!r}")
    try:
        check_base(name, key, model.trust_remote_code, **_located(model))
        return AutoConfig.from_pretrained(name, **_source(model))
    except UserError:
        raise
    except Exception as error:  # each model's configuration has its own, for what is in a file
        raise UserError(f"{key}: {_why_not(model, error)}") from error


def _source(model: ModelSection) -> dict[str, Any]:
    """Where `from_pretrained` looks."""
    return _located(model) | {"trust_remote_code": model.trust_remote_code}


def _located(model: ModelSection) -> dict[str, Any]:
    return {"revision": model.revision, "local_files_only": _offline(model) is not None}  # what was fetched will do


def _offline(model: ModelSection) -> str | None:
    return None if Path(model.name).expanduser().is_dir() else unreachable()


def _why_not(model: ModelSection, error: BaseException) -> str:
    if offline := _offline(model):
        return f"{model.name} is no local folder, and {offline}"
    return f"{model.name} could not be loaded: {_first_line(error)}"


def load_tokenizer(model: ModelSection, key: str = "model.name", **options: Any) -> Any:
    """The model's tokenizer, with a padding token; `options` for `from_pretrained`. Raises UserError if it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name, **_source(model), **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # that of tokenizers is `Exception`, and its PanicException not even that
        # A tokenizer opens the files that it wants without asking whether they were found.
        cause = OSError("a file of it is missing") if isinstance(error, TypeError) else error
        raise UserError(f"{key}: no tokenizer: {_why_not(model, cause)}") from error
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise UserError(
            f"{key}: model_max_length of its tokenizer: expected a number, got {tokenizer.model_max_length!r}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never learned, and never attended to
    if tokenizer.pad_token is None:
        raise UserError(f"{key}: expected a tokenizer with a padding or an end-of-sequence token, got one without")
    return tokenizer


def positions(config: Any) -> int | None:
    """How many tokens the model has positions for; None where there is no such limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    return min([longest, *_positions_behind_padding(config)])


def is_rotary(config: Any) -> bool:
    """Whether the model's positions are angles, which go on beyond the last position, and not rows of a table."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "rope_parameters", None))


def _positions_behind_padding(config: Any) -> list[int]:
    """For encoders of RoBERTa's kind, whose positions begin behind that of the padding; empty for all others."""
    import torch
    from transformers import AutoModel
    from transformers.models.auto import modeling_auto

    kind = getattr(config, "model_type", "")
    if getattr(config, "auto_map", None) or kind not in modeling_auto.MODEL_MAPPING_NAMES:
        return []
    decoder = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False)
    if decoder and not encoder:
        return []
    try:
        with torch.device("meta"):  # without any values
            modules = dict(AutoModel.from_config(copy.deepcopy(config)).named_modules())
    except Exception:  # of any kind: what is wrong with it is told when it is loaded
        return []
    ahead = 1 if "prophetnet" in kind else 0  # how far its decoder looks beyond a token
    return [
        module.weight.shape[0] - module.padding_idx - 1 - ahead
        for name, module in modules.items()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]


def checked_length(wanted: int | None, config: Any, key: str = "data.max_length") -> int:
    """Tokens a row. Raises UserError for a number below 2 or beyond the model's last position."""
    longest = positions(config)
    if wanted is None:
        return min(USUAL_LENGTH, longest or USUAL_LENGTH)
    if wanted < 2:
        raise UserError(f"{key}: expected at least 2, got {wanted}")
    if longest is not None and wanted > longest:
        raise UserError(f"{key}: expected at most {longest}, the model's last position, got {wanted}")
    return wanted


def quantization_config(quantization: str, double_quant: bool, dtype: torch.dtype) -> Any:
    """bitsandbytes' configuration; None for "none".

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization: {quantization} needs bitsandbytes: pip install bitsandbytes")
    from fastpeft.memory.packed.loading import bits_and_bytes

    return bits_and_bytes(quantization, double_quant, dtype)


def load_base(
    model: ModelSection,
    task: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
    *,
    key: str = "model.name",
    whole: Sequence[str] = (),
    mapped: bool = False,
    **others: Any,
) -> tuple[Any, list[str]]:
    """The base model on its device, in evaluation mode.

    Args:
        model: its section.
        task: one of tasks.AUTO.
        device, dtype: where and in what it computes.
        quantization: storage of the weights; a checkpoint that is stored quantised stays as it is.
        key: what the user calls the model.
        whole: names of modules that are trained or saved whole. They are not quantised, nor are a classifier's head and
            what the checkpoint has no values for.
        mapped: 4-bit weights on the CPU stay in the files of their cache, see `fastpeft.load`.
        others: for `from_pretrained`, such as num_labels.

    Returns:
        (model, names of the modules that the checkpoint has no values for).

    Raises:
        UserError: it cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **others}
    bits = quantization_config(quantization, model.double_quant, dtype)
    if bits is not None and getattr(load_config(model, key), "quantization_config", None) is None:
        options["quantization_config"] = bits
    if model.attention is not None:
        if model.attention == ATTENTION:
            fastpeft.register_attention()
        options["attn_implementation"] = model.attention
    if device.type == "cuda" or "quantization_config" in options:  # bitsandbytes would take a GPU by itself
        options["device_map"] = {"": device}
    base, missing = _from_pretrained(model, task, key, options, mapped)
    heads = HEADS.get(task, ())
    if "quantization_config" in options and (names := _quantised(base, [*whole, *heads, *missing])):
        bits.llm_int8_skip_modules = names + _plain(base)
        del base
        base, missing = _from_pretrained(model, task, key, options, mapped)
    return base, missing


def _quantised(base: Any, within: list[str]) -> list[str]:
    """Names of the quantised modules among or within those of these names."""
    found = [name for name, module in base.named_modules() if type(module).__module__.startswith("bitsandbytes.")]
    return [name for name in found if any(f".{one}." in f".{name}." for one in within)]


def _plain(base: Any) -> list[str]:
    """Names of the linear modules that transformers left as they are."""
    from torch.nn import Linear

    return [name for name, module in base.named_modules() if type(module) is Linear]


def _from_pretrained(
    model: ModelSection, task: str, key: str, options: dict[str, Any], mapped: bool
) -> tuple[Any, list[str]]:
    from fastpeft.integrations import packed_loading
    from fastpeft.memory.packed.entries import user_folder
    from fastpeft.memory.packed.loading import check_index

    kind, options = auto_class(task), _source(model) | {"use_safetensors": True} | options
    bits = options.get("quantization_config")
    try:
        check_index(Path(model.name).expanduser())
        if model.packed_cache and bits is not None and bits.load_in_4bit:
            base, info = packed_loading.from_pretrained(kind, model.name, user_folder(), mapped, **options)
        else:
            base, info = kind.from_pretrained(model.name, **options)
    except Exception as error:  # of any kind: each way to store weights has its own, for what is in a file
        if type(error).__name__ == "OutOfMemoryError":
            raise
        if model.attention is not None and ("attn" in str(error) or "Attention" in str(error)):
            raise UserError(f"model.attention: {_first_line(error)}") from error
        raise UserError(f"{key}: {_why_not(model, error)}") from error
    if hasattr(base, "generation_config"):
        check_generation(base.generation_config, key)
    return base, sorted({name.rpartition(".")[0] for name in info["missing_keys"]})


def _first_line(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"its files have no {error}"
    if isinstance(error, ImportError) and (needs := re.search(r"requires the (\w+) library", str(error))):
        return f"it needs {needs[1]}: pip install {needs[1].lower()}"
    if isinstance(error, OSError) and "safetensors" in str(error):
        return "it has no weights in safetensors; other files are pickles, which are never read"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (" ".join(lines) if lines[0].endswith(":") else lines[0])[:300]
