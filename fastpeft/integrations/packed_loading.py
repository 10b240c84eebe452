"""transformers' own loader, with 4-bit weights taken from a cache of packed ones, and put there.

The loader reads a checkpoint tensor by tensor and quantises each at once. Between its reading and its quantising it is
given what is packed already; renaming, tying, initialising and all else stay its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..memory.packed.cache import PackedCache
from ..memory.packed.entries import key_of
from ..memory.packed.files import Packed

logger = logging.getLogger("fastpeft")
_LIBRARIES = ("bitsandbytes", "torch", "transformers")


def from_pretrained(kind: Any, name: str, folder: Path, mapped: bool = False, **options: Any) -> Any:
    """`kind.from_pretrained(name, **options)`, with packed weights from and in entries of a folder.

    Args:
        kind: an auto class or a model class of transformers. Models of remote code are loaded without the cache.
        name: folder or ID on the hub.
        folder: of all entries.
        mapped: packed weights stay in the cache's files, mapped into memory. On the CPU only.
        options: for `from_pretrained`.
    """
    return _caching(kind, folder, mapped).from_pretrained(name, **options)


def _caching(kind: Any, folder: Path, mapped: bool) -> Any:
    """A class like `kind` whose `from_pretrained` uses the cache; the models that it makes are of their own class."""
    if hasattr(kind, "_model_mapping"):
        changed: dict[str, Any] = {
            "_model_mapping": _Caching(kind._model_mapping, lambda model: _caching(model, folder, mapped))
        }
    elif hasattr(kind, "_load_pretrained_model"):
        changed = {"_load_pretrained_model": staticmethod(_loader(kind, folder, mapped))}
    else:
        return kind
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__, **changed})


class _Caching:
    """An auto class's table of model classes, each through `change`."""

    def __init__(self, table: Any, change: Callable[[Any], Any]) -> None:
        self._table, self._change = table, change

    def __getitem__(self, config: Any) -> Any:
        found = self._table[config]
        return tuple(map(self._change, found)) if isinstance(found, (list, tuple)) else self._change(found)

    def __contains__(self, config: Any) -> bool:
        return config in self._table

    def __iter__(self) -> Iterator[Any]:
        return iter(self._table)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)


def _loader(kind: Any, folder: Path, mapped: bool) -> Callable[..., Any]:
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any, **named: Any) -> Any:
        model.__class__ = kind
        plain = kind._load_pretrained_model
        if state_dict is not None or not _cacheable(checkpoint_files, load_config):
            if mapped:
                logger.warning("these weights are not cached, so that none of them stays in a mapped file")
            return plain(model, state_dict, checkpoint_files, load_config, *rest, **named)
        settings, about = _settings(kind, load_config)
        source = _Source(PackedCache(folder / key_of(checkpoint_files, settings), about), mapped)
        with source.cache, _packed_once(model, checkpoint_files, load_config.hf_quantizer, source) as slices:
            found = plain(model, slices, None, load_config, *rest, **named)
        source.map_written(model)
        return found

    return load


class _Source:
    """Where packed weights come from.

    Args:
        mapped: whether they stay there.
    """

    def __init__(self, cache: PackedCache, mapped: bool) -> None:
        self.cache, self.mapped = cache, mapped
        self._written: list[str] = []

    def read(self, target: str, module: Any, like: Tensor) -> nn.Parameter | None:
        """The weight of a Linear4bit, if it is there; `module` and `like` as for `_unpacked`."""
        parts = self.cache.read(target)
        return None if parts is None else _unpacked(module, parts, like, not self.mapped)

    def add(self, weight: Packed, model: Any) -> None:
        """Keep one that was packed in this run."""
        self.cache.add(weight)
        if self.mapped:
            self._written.append(weight.target)
            self.map_written(model)

    def map_written(self, model: Any) -> None:
        """Of the codes that were packed in this run leave in memory those that no file has yet. Scales stay there."""
        left = []
        for target in self._written:
            weight, parts = model.get_parameter(target), self.cache.read(target)
            if parts is None or weight.device.type != "cpu":  # on the meta device: it is being made
                left.append(target)
            else:
                weight.data = parts[""]
        self._written = left


def _cacheable(files: Any, load_config: Any) -> bool:
    """Whether the loader will quantise to 4 bits, tensor by tensor, what is in safetensors."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    quantizer = load_config.hf_quantizer
    if type(quantizer) is not Bnb4BitHfQuantizer or quantizer.pre_quantized or load_config.disable_mmap:
        return False
    places = set((load_config.device_map or {}).values())
    one_place = len(places) <= 1 and "disk" not in places
    safe = bool(files) and all(str(file).endswith(".safetensors") for file in files)
    return safe and one_place and load_config.device_mesh is None and not load_config.ignore_mismatched_sizes


def _settings(kind: Any, load_config: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What packed values depend on beside the files; and that in a few words."""
    chosen = load_config.hf_quantizer.quantization_config
    place = next(iter((load_config.device_map or {"": "cpu"}).values()))
    device = "cuda" if isinstance(place, int) else torch.device(place).type
    dtype, nested = str(load_config.dtype).removeprefix("torch."), chosen.bnb_4bit_use_double_quant
    settings = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "quantization": [chosen.bnb_4bit_quant_type, nested, str(chosen.bnb_4bit_quant_storage), dtype, device],
        "names": re.sub(r" at 0x\w+", "", repr(load_config.weight_mapping)),
        "libraries": [metadata.version(name) for name in _LIBRARIES],
    }
    parts = [chosen.bnb_4bit_quant_type, "double quantisation" if nested else "", dtype, device]
    about = {
        "source": str(load_config.pretrained_model_name_or_path),
        "packing": ", ".join(part for part in parts if part),
    }
    return settings, about


@contextmanager
def _packed_once(model: Any, files: list[str], quantizer: Any, packed: _Source) -> Iterator[dict[str, _Slice]]:
    """The checkpoint's tensors, unread; meanwhile the quantiser takes what is packed from the cache."""
    from safetensors import safe_open

    opened = [safe_open(file, framework="pt") for file in files]
    slices = {name: _Slice(file.get_slice(name)) for file in opened for name in file.keys()}  # noqa: SIM118
    parameters = dict(model.named_parameters())
    for target, source in packed.cache.sources.items():
        if source in slices and target in parameters and quantizer.param_needs_quantization(model, target):
            slices[source].packed = True
    plain = quantizer.get_quantize_ops
    quantizer.get_quantize_ops = lambda: _PackOnce(plain(), slices, packed)
    try:
        yield slices
    finally:
        del quantizer.get_quantize_ops  # the class's own again


class _Slice:
    """A tensor of a checkpoint, read when it is indexed; one that is packed already is not read: it comes out empty."""

    def __init__(self, unread: Any) -> None:
        self.unread, self.packed = unread, False

    def __getitem__(self, index: Any) -> Any:
        return torch.empty(0) if self.packed else self.unread[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unread, name)


class _PackOnce:
    """The loader's operation that quantises a weight, unless it is in the cache."""

    def __init__(self, plain: Any, slices: dict[str, _Slice], packed: _Source) -> None:
        self._plain, self._slices, self._packed = plain, slices, packed

    def convert(self, input_dict: dict[str, Any], *, source_patterns: list[str], model: Any, **more: Any) -> Any:
        renamed = len(source_patterns) == 1 and source_patterns[0] in self._slices and len(input_dict) == 1
        if not renamed:  # made of several tensors, or one of several made of one: from the checkpoint each time
            return self._plain.convert(input_dict, source_patterns=source_patterns, model=model, **more)
        (target, given), source = next(iter(input_dict.items())), source_patterns[0]
        value = given[0] if isinstance(given, list) else given
        if self._slices[source].packed:
            module = model.get_submodule(target.rpartition(".")[0])
            weight = self._packed.read(target, module, value)
            if weight is not None:
                return {target: weight}
            value = self._slices[source].unread[...].to(value.device, value.dtype)
        made = self._plain.convert({target: [value]}, source_patterns=source_patterns, model=model, **more)
        self._packed.add(Packed(target, source, _parts(made[target])), model)
        return made


def _parts(weight: Any) -> dict[str, Tensor]:
    """A quantised weight as bitsandbytes writes it to a state dict."""
    return {"": weight} | {f".{name}": part for name, part in weight.quant_state.as_dict(packed=True).items()}


def _unpacked(module: Any, parts: dict[str, Tensor], like: Tensor, copy: bool) -> nn.Parameter | None:
    """The weight of a Linear4bit from its parts; None if they are not those of this layer.

    Args:
        module: the layer, its weight on the meta device.
        parts: as `_parts` made them.
        like: has the device, and the dtype from which the weight is packed.
        copy: into memory of its own; the file's is there as long as what is read of it.
    """
    from bitsandbytes.nn import Params4bit

    old = module.weight
    stats = {  # what is JSON stays on the CPU, where it is read
        name.removeprefix("."): part.to("cpu" if "quant_state" in name else like.device, copy=copy)
        for name, part in parts.items()
    }
    data = stats.pop("")
    try:
        weight = Params4bit.from_prequantized(
            data=data, quantized_stats=stats, requires_grad=False, device=like.device, module=module
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    state = weight.quant_state
    found = (state.shape, state.dtype, state.blocksize, state.quant_type, state.nested, data.dtype)
    if found != (old.shape, like.dtype, old.blocksize, old.quant_type, old.compress_statistics, old.quant_storage):
        return None
    if state.nested and state.offset.dtype != torch.float32:  # bitsandbytes makes it in torch's default dtype
        return None
    blocks = -(-old.numel() // old.blocksize)
    sizes = (data.shape[1:], data.numel() * data.element_size(), state.code.numel(), state.absmax.numel())
    if sizes != ((1,), (old.numel() + 1) // 2, 16, blocks):
        return None
    if state.nested:
        scales = state.state2
        if (scales.blocksize, scales.code.numel(), scales.absmax.numel()) != (256, 256, -(-blocks // 256)):
            return None
    module._is_hf_initialized = True
    return weight  # type: ignore[no-any-return]
