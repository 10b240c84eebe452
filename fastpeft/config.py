"""A run's configuration: one nested dataclass, for YAML files and for `--section.key value` on a command line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from fastpeft.config_keys import ELSEWHERE, check_value, key_of, keys, nearest_key
from fastpeft.hints import nearest
from fastpeft.structured import build, unknown_key
from fastpeft.yaml_loading import LARGEST, parse_yaml

SHORT = {"model": "name", "data": "path"}
"""Sections that may be given as one word: `model: NAME` is `model: {name: NAME}`."""


def option(default: Any, text: str) -> Any:
    """A field of a section: its default (`list` or `dict` for an empty one) and what --help says of it."""
    if default in (list, dict):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelSection:
    """The base model."""

    name: str = option("", "Folder, or ID on the hub.")
    task: Literal[
        "auto",
        "causal-lm",
        "seq2seq-lm",
        "masked-lm",
        "sequence-classification",
        "token-classification",
        "question-answering",
        "feature-extraction",
    ] = option("auto", "What the model is trained to do; auto: by the data's columns and the model.")
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    quantization: Literal["none", "nf4", "fp4", "int8"] | None = option(
        None, "Storage of the frozen weights (bitsandbytes); null: nf4 for method qlora, none for lora."
    )
    double_quant: bool = option(True, "Store the scales of nf4 and fp4 in 8 bits too.")
    packed_cache: bool = option(True, "Keep nf4 and fp4 weights in the user's cache folder, for later runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "What is computed with; auto: float32 on a CPU, on a GPU bfloat16, or float16 where it has none."
    )
    attention: str | None = option(None, "transformers' attn_implementation; its default when null.")
    trust_remote_code: bool = option(False, "Run code that comes with a model on the hub.")


@dataclass(frozen=True)
class DataSection:
    """What is trained on."""

    path: str = option(
        "", "File (.jsonl, .json, .csv, .parquet, .txt), folder of such files or of `datasets`, or ID on the hub."
    )
    name: str | None = option(None, "Which of a hub data set's configurations.")
    split: str = option("train", "Which split to train on.")
    eval_path: str | None = option(None, "File, folder or ID to evaluate on.")
    eval_split: str | None = option(None, "Which split to evaluate on.")
    eval_fraction: float = option(0.0, "Share of the training rows held back to evaluate on, drawn by the seed.")
    columns: dict[str, str] = option(
        dict, "Names of your columns, such as {text: review, label: stars}; expected names need no entry."
    )
    labels: list[str] | None = option(None, "Names of the classes, in the order of their numbers; found when null.")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = option(
        None, "What a text's label is; null: lists are several classes, fractions numbers to learn, else one class."
    )
    label_all_pieces: bool = option(False, "Words with tags: learn all tokens of a word, not only its first.")
    stride: int | None = option(None, "Tokens that two windows over a context share; null: a third of max_length.")
    max_length: int | None = option(
        None, "In tokens; longer rows are cut, text files divided; null: 1024, or the model's last position if before."
    )
    packing: bool = option(False, "Several examples to a row (decoders); they do not see each other.")
    chat_template: str | None = option(
        None, 'Jinja file, "chatml", "plain" or "own", the tokenizer\'s; null: own, plain if it has none.'
    )
    eos_token: str | None = option(None, "Token that ends a text or an answer; null: the tokenizer's own.")
    source_language: str | None = option(
        None, "Language code of the prompts, for translators of several languages; null: the tokenizer's own."
    )
    target_language: str | None = option(None, "Language code of the completions, likewise.")
    assistant_only: bool = option(True, "Chats: learn the assistant's turns only.")
    limit: int | None = option(None, "Use at most so many rows.")


@dataclass(frozen=True)
class LoraSection:
    """As PEFT's LoraConfig."""

    r: int = option(16, "Rank of the adapter.")
    alpha: float = option(32.0, "lora_alpha: the adapter is scaled by alpha / r.")
    dropout: float = option(0.0, "lora_dropout.")
    target_modules: str | list[str] = option(
        "all-linear", "Names (a list, or a,b), a regular expression, or all-linear."
    )
    exclude_modules: list[str] = option(list, "Names to leave out.")
    modules_to_save: list[str] = option(list, "Modules trained and saved whole.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r).")
    use_dora: bool = option(False, "DoRA: magnitude and direction apart.")
    bias: Literal["none", "all", "lora_only"] = option("none", "Which biases are trained.")
    init_lora_weights: bool | str = option(True, "true, gaussian, pissa, olora, ... as in PEFT.")
    extra: dict[str, Any] = option(dict, "Any other option of PEFT's LoraConfig.")


@dataclass(frozen=True)
class TrainingSection:
    """As transformers' TrainingArguments."""

    output_dir: str = option("runs/fastpeft", "Where everything goes.")
    learning_rate: float = option(2e-4, "Peak learning rate.")
    num_train_epochs: float = option(1.0, "How often the data is gone through.")
    max_steps: int = option(-1, "If above 0, so many steps whatever the epochs.")
    per_device_train_batch_size: int = option(8, "Rows a step and device.")
    per_device_eval_batch_size: int = option(8, "Rows of an evaluation's forward.")
    gradient_accumulation_steps: int = option(1, "Forwards a step.")
    warmup_steps: float = option(0.0, "Steps until the peak; below 1 a share of all steps.")
    weight_decay: float = option(0.0, "Of AdamW.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    lr_scheduler_type: str = option("linear", "Schedule: linear, cosine, constant, constant_with_warmup, ...")
    optim: str = option("adamw_torch", "Optimizer: adamw_torch, fastpeft_adamw, paged_adamw_8bit, adafactor, ...")
    logging_steps: int = option(10, "Steps between two logged losses.")
    eval_steps: int | None = option(None, "Steps between two evaluations; null: after each epoch.")
    save_steps: int | None = option(None, "Steps between two checkpoints; null: after each epoch.")
    save_total_limit: int | None = option(2, "How many checkpoints are kept; null: all.")
    seed: int = option(0, "Of the adapter's first values, dropout and the order of the data.")
    report_to: str | list[str] = option("tensorboard", "tensorboard, wandb, mlflow, ... or none.")
    push_to_hub: bool = option(False, "Upload adapter and model card at the end.")
    hub_model_id: str | None = option(None, "Where to; by default the output folder's name under your account.")
    extra: dict[str, Any] = option(dict, "Any other of transformers' TrainingArguments (TRL's SFTConfig for decoders).")


@dataclass(frozen=True)
class MemorySection:
    """How much memory a run may take."""

    budget_gib: float | None = option(
        None, "GPU memory a run may take, in GiB; null: what is free on the GPU. Layers keep what a plan says fits."
    )
    host_gib: float | None = option(
        None,
        "Host memory that inputs and streamed weights of all processes on a machine may take, in GiB; null: what is "
        "available, on a GPU. 4-bit weights beyond it wait on the disk.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: less memory, more time.")
    activations: Literal["keep", "selective", "recompute", "offload"] | None = option(
        None, "What every layer keeps for backward, in place of a plan; offload: nothing, inputs go to host memory."
    )
    streamed: bool = option(False, "Frozen weights of layers stay in host memory and are copied ahead of each use.")
    ring: int = option(2, "Streamed layers that are on the GPU at once.")
    decoded: int | str = option(
        0, "Bytes, or a size such as 400MiB: decoded 4-bit weights of a recomputed layer that wait for its backward."
    )
    retry: bool = option(False, "Run a step that runs out of memory again, with less kept for backward from then on.")


@dataclass(frozen=True)
class StrategySection:
    """How the fine-tuning is done."""

    name: str = option("task", 'The strategy; "task" is supervised fine-tuning.')
    options: dict[str, Any] = option(dict, "The strategy's own settings.")


@dataclass(frozen=True)
class AccelerationSection:
    """What fastpeft does to the model."""

    enabled: bool = option(True, "Call fastpeft.accelerate; without it the run is plain PEFT.")


@dataclass(frozen=True)
class FastpeftConfig:
    """Everything that defines a run. Immutable: `override` gives a changed copy."""

    method: Literal["lora", "qlora"] = option("lora", "qlora: over a base stored in 4 bits.")
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
        if isinstance(data, dict):
            data = {k: {SHORT[k]: v} if k in SHORT and isinstance(v, str) else v for k, v in data.items()}
            sections = [section.name for section in fields(cls)]
            for name in map(str, data):
                check_value(name, key_of(name), data.get(name))
                near_a_section = name not in ELSEWHERE and nearest(name, sections)
                key = None if name in sections else key_of(name) or (None if near_a_section else nearest_key(name))
                if key is not None:
                    raise ValueError(f"{name}: unknown key, did you mean {key!r}?")
            for section, values in data.items():
                for name, value in values.items() if section in sections and isinstance(values, dict) else ():
                    check_value(f"{section}.{name}", f"{section}.{name}", value)
                    if name in ELSEWHERE and f"{section}.{name}" not in keys():
                        raise ValueError(f"{section}.{name}: unknown key, did you mean {ELSEWHERE[name]!r}?")
        return build(cls, data)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> FastpeftConfig:
        """From a YAML file; errors as from_dict's, and ValueError for a file that is no YAML or repeats a key."""
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(parse_yaml(file.read(LARGEST + 1), Path(path).name) or {})

    def to_dict(self) -> dict[str, Any]:
        """As plain nested dictionaries; `from_dict` gives the same configuration back."""
        return asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

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
            _set(data, key.strip(), parse_yaml(text, key))
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
