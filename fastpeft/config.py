"""A run's configuration: one nested dataclass, for YAML files and for `section.key=value` on a command line."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastpeft.structured import build, unknown_key


@dataclass(frozen=True)
class ModelSection:
    """The base model.

    Attributes:
        name: checkpoint on the hub, or a folder.
        task: which Auto class loads it.
        quantization: storage of the frozen weights (bitsandbytes); `double_quant` is nf4's and fp4's.
        dtype: of the weights, "auto" as the checkpoint has it.
        attention: transformers' `attn_implementation`; its default when null.
    """

    name: str = ""
    task: Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification"] = "causal-lm"
    revision: str | None = None
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quant: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSection:
    """What is trained on.

    Attributes:
        path: a file (.jsonl, .csv, .txt, .parquet), a folder saved by `datasets`, or a dataset's name on the hub.
        text, label: columns; `label` for classification, or the target text of an encoder-decoder.
        max_length: in tokens; longer examples are cut.
        packing: several examples to a row, where the trainer can.
    """

    path: str = ""
    split: str = "train"
    eval_split: str | None = None
    text: str = "text"
    label: str | None = None
    max_length: int = 1024
    packing: bool = False


@dataclass(frozen=True)
class LoraSection:
    """As PEFT's LoraConfig; `alpha` and `dropout` are its `lora_alpha` and `lora_dropout`."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    use_rslora: bool = False


@dataclass(frozen=True)
class TrainingSection:
    """As transformers' TrainingArguments; `extra` passes any other of them through."""

    output_dir: str = "runs/fastpeft"
    learning_rate: float = 2e-4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    optim: str = "adamw_torch"
    logging_steps: int = 10
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MemorySection:
    """How much memory a run may take.

    Attributes:
        budget_gib: GPU memory that a run may take; all of it when null.
        gradient_checkpointing: recompute activations in backward.
    """

    budget_gib: float | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class StrategySection:
    """How the fine-tuning is done.

    Attributes:
        name: the fine-tuning strategy; "task" is plain supervised fine-tuning.
        options: the strategy's own settings, which it checks.
    """

    name: str = "task"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AccelerationSection:
    """What fastpeft does to the model.

    Attributes:
        enabled: whether `fastpeft.accelerate` is called at all; without it the run is plain PEFT.
    """

    enabled: bool = True


@dataclass(frozen=True)
class FastpeftConfig:
    """Everything that defines a run. Immutable: `override` gives a changed copy."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    lora: LoraSection = field(default_factory=LoraSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    memory: MemorySection = field(default_factory=MemorySection)
    strategy: StrategySection = field(default_factory=StrategySection)
    acceleration: AccelerationSection = field(default_factory=AccelerationSection)

    @classmethod
    def from_dict(cls, data: Any) -> FastpeftConfig:
        """From nested mappings; absent keys keep their defaults.

        Raises:
            ValueError: an unknown key (the nearest right one is named), or a value that is not one of those allowed.
            TypeError: a value of the wrong type; key, expected and got are named.
        """
        return build(cls, data)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> FastpeftConfig:
        """From a YAML file; errors as from_dict's, and ValueError for a file that is no YAML or repeats a key."""
        return cls.from_dict(_parse(Path(path).read_text(), Path(path).name) or {})

    def to_dict(self) -> dict[str, Any]:
        """As plain nested dictionaries; `from_dict` gives the same configuration back."""
        return asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def override(self, settings: Iterable[str]) -> FastpeftConfig:
        """A copy with some values changed.

        Args:
            settings: such as "lora.r=8"; what follows "=" is read as YAML.

        Raises:
            ValueError: not of this form, or as from_dict. TypeError: as from_dict.
        """
        data = self.to_dict()
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or not key:
                raise ValueError(f"override: expected section.key=value, got {setting!r}")
            _set(data, key.strip(), _parse(text, key))
        return self.from_dict(data)


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        below = data.get(section)
        if not isinstance(below, dict):
            path = ".".join(sections[: depth + 1])
            if section in data:
                raise ValueError(f"{key}: {path} has no keys of its own")
            raise ValueError(unknown_key(path, [".".join([*sections[:depth], known]) for known in data]))
        data = below
    data[last] = value


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number, which YAML 1.1 takes for text, and without keys that silently replace each other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
