"""A fine-tuned model for use: an adapter's folder with its base, or a whole model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.config import FastpeftConfig, ModelSection
from fastpeft.errors import UserError
from fastpeft.hub import unreachable

from . import bases
from .new_tokens import make_room
from .tasks import HEADS, PEFT_TASKS, UNUSED, head_options, task_of
from .untrusted import ADAPTER_WEIGHTS, check_adapter_config, check_adapter_weights

if TYPE_CHECKING:
    import torch

TOKENIZER, ADAPTER = "tokenizer_config.json", "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """What a name stands for, found out without loading weights.

    Attributes:
        name: as the user gave it.
        model: the base's section, with quantisation as the adapter was trained on.
        adapter: folder or hub ID of the adapter; None for a whole model.
        task: what it does.
        chats: whether it was trained on chats; None where that is not known.
        whole: modules that the adapter holds whole.
        labels: of a classifier that `fastpeft train` made; None where they are not known.
        problem_type: what a text's label is, as transformers' configurations have it; None where it is not known.
        max_length: in tokens, of the rows that `fastpeft train` trained on; None where it is not known.
        config: transformers', of the base.
    """

    name: str
    model: ModelSection
    adapter: str | None
    task: str
    chats: bool | None
    whole: tuple[str, ...]
    labels: list[str] | None
    problem_type: str | None
    max_length: int | None
    config: Any

    @property
    def tokenizer_from(self) -> str:
        """The adapter's folder where it holds one: it may have a chat template of its own."""
        if self.adapter is None:
            return self.model.name
        local = Path(self.adapter).is_dir()
        own = (Path(self.adapter) / TOKENIZER).is_file() if local else _file_of(self.adapter, TOKENIZER) is not None
        return self.adapter if own else self.model.name


def find(name: str, *, base: str | None = None, key: str = "MODEL", trust_remote_code: bool = False) -> Source:
    """What `name` stands for.

    Args:
        name: an adapter's folder or hub ID, or a whole model's.
        base: another base for an adapter than the one that its configuration names.
        key: what the user calls it.
        trust_remote_code: run code that comes with the model. What a run's own configuration says does not count: it
            came with the folder.

    Raises:
        UserError: neither an adapter nor a model, or the base cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / mark).is_file() for mark in (ADAPTER, "config.json")):
        raise UserError(f"{key}: expected a folder with adapter_config.json or config.json, got {name}{_runs(folder)}")
    adapter = _adapter_config(name, folder, key)
    if adapter is not None:
        check_adapter_config(adapter, key)
    if adapter is not None and not folder.is_dir() and (config_file := _file_of(name, "config.yaml")) is not None:
        run = _run_of(config_file.parent)
    else:
        run = _run_of(folder)
    if adapter is None:
        if base is not None:
            raise UserError(f"--base: expected none, because {name} is a whole model, got {base}")
        model = ModelSection(name=bases.checked_name(name, key), trust_remote_code=trust_remote_code)
        config = bases.load_config(model, key)
        problem = getattr(config, "problem_type", None)
        return Source(name, model, None, task_of(config), None, (), _labels(config), problem, None, config)
    model = run.model if run else ModelSection(name=adapter.base_model_name_or_path or "", revision=adapter.revision)
    if base is not None:
        model = replace(model, name=base, revision=None)
    base_key = "--base" if base is not None else f"{key}: base model of {name}"
    model = replace(model, name=bases.checked_name(model.name, base_key), quantization=model.quantization or "none")
    model = replace(model, trust_remote_code=trust_remote_code, attention=None)
    config = bases.load_config(model, base_key)
    named = {peft: task for task, peft in PEFT_TASKS.items()}
    task = run.model.task if run else named.get(adapter.task_type) or task_of(config)
    labels = run.data.labels if run else None
    path = str(folder.resolve()) if folder.is_dir() else name
    labels = labels if task in HEADS else None
    problem = run.data.problem_type if run else None
    chats = run.data.chat_template is not None if run else None
    length = run.data.max_length if run else None
    saved = tuple(getattr(adapter, "modules_to_save", None) or ())
    return Source(name, model, path, task, chats, saved, labels, problem, length, config)


def load(source: Source, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> Any:
    """The model, in evaluation mode; an adapter's layers accelerated.

    Args:
        quantization: storage of the base's weights; as the adapter was trained on when None.

    Raises:
        UserError: base or adapter cannot be loaded, or do not belong together.
    """
    import fastpeft

    base, fresh = load_base(source, device, dtype, quantization)
    model = base.eval() if source.adapter is None else attach(source, base)
    check_values(source, fresh)
    if source.adapter is not None:
        fastpeft.accelerate(model)
    return model


def load_base(
    source: Source, device: torch.device, dtype: torch.dtype, quantization: str | None = None
) -> tuple[Any, list[str]]:
    """(the base alone, names of the modules that its checkpoint has no values for); errors as `load`."""
    kept = source.model.quantization or "none"
    others = {} if source.adapter is None else head_options(source.task, source.labels, source.problem_type)
    base, fresh = bases.load_base(
        source.model, source.task, device, dtype, quantization or kept, key="MODEL", whole=source.whole, **others
    )
    if source.task == "sequence-classification":  # decoders look for the last token that is no padding
        base.config.get_text_config().pad_token_id = load_tokenizer(source).pad_token_id
    return base, fresh


def check_values(source: Source, fresh: list[str]) -> None:
    """Raise UserError if neither the base's checkpoint nor the adapter has values for a module.

    Args:
        fresh: what the checkpoint has none for, from load_base.
    """
    trained = () if source.adapter is None else (*source.whole, *HEADS.get(source.task, ()))
    fresh = [name for name in fresh if name not in UNUSED.get(source.task, ())]
    lacking = [name for name in fresh if not any(f".{one}." in f".{name}." for one in trained)]
    if lacking:
        raise UserError(
            f"MODEL: {source.model.name} has no values for {', '.join(lacking[:4])}, so its answers would be random"
        )


def attach(source: Source, base: Any) -> Any:
    """The adapter on its base, in evaluation mode; errors as `load`."""
    from peft import PeftModel

    folder = adapter_folder(source, base)
    if source.tokenizer_from == source.adapter:
        make_room(base, lambda: len(load_tokenizer(source)), folder)
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = next((line.strip() for line in str(error).splitlines()[1:] if "size mismatch" in line), str(error))
        raise UserError(f"MODEL: {source.name} does not fit {source.model.name}: {reason.splitlines()[0]}") from error


def adapter_folder(source: Source, base: Any) -> Path:
    """Where the adapter's files are, its weights looked at before anything is made of them; errors as `load`."""
    from peft import PeftConfig

    assert source.adapter is not None
    folder = Path(source.adapter) if Path(source.adapter).is_dir() else _weights_of(source.adapter)
    check_adapter_weights(folder, PeftConfig.from_pretrained(str(folder)), base, "MODEL")
    return folder


def load_tokenizer(source: Source) -> Any:
    """The tokenizer; errors as `load`."""
    where = source.tokenizer_from
    if where == source.model.name:
        return bases.load_tokenizer(source.model, "MODEL")
    # The revision is the base's; an adapter on the hub has no config.json, for which transformers would look.
    options = {} if Path(where).is_dir() else {"config": source.config}
    return bases.load_tokenizer(replace(source.model, name=where, revision=None), "MODEL", **options)


def _adapter_config(name: str, folder: Path, key: str) -> Any:
    if folder.is_dir() and not (folder / ADAPTER).is_file():
        return None
    if not folder.is_dir() and not bases.HUB_ID.fullmatch(name):
        bases.checked_name(name, key)  # says what is wrong
    file = folder / ADAPTER if folder.is_dir() else _file_of(name, ADAPTER)
    if file is None:
        return None  # an ID of something else, or out of reach: what follows says so
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(file.parent))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{key}: {name}/adapter_config.json cannot be read: {error}") from error


def _run_of(folder: Path) -> FastpeftConfig | None:
    """The configuration of the run that made an adapter, beside it or, for a checkpoint, above it."""
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        try:
            return FastpeftConfig.from_yaml(place / "config.yaml")
        except (OSError, ValueError, TypeError):
            continue
    return None


def _file_of(name: str, file: str) -> Path | None:
    """A file of an adapter on the hub, or as it was fetched earlier; None where there is none of that name."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, local_files_only=unreachable() is not None))
    except (OSError, ValueError):
        return None


def _weights_of(name: str) -> Path:
    """Folder of an adapter from the hub. PEFT would ask for each file anew, and wait where there is no network."""
    found = _file_of(name, ADAPTER_WEIGHTS)
    if found is None:
        raise UserError(f"MODEL: {name} has no {ADAPTER_WEIGHTS} here, and {unreachable() or 'none on the hub'}")
    return found.parent


def _labels(config: Any) -> list[str] | None:
    names: dict[int, str] | None = getattr(config, "id2label", None)
    return [names[number] for number in sorted(names)] if names else None


def _runs(folder: Path) -> str:
    """What in a folder could be meant: adapters of tasks, or a checkpoint."""
    places = [path.parent for path in folder.glob(f"*/{ADAPTER}")]
    if apart := sorted(str(path) for path in places if not path.name.startswith("checkpoint-")):
        return f"; adapters are in {', '.join(apart)}"
    found = sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: (len(name), name))
    return f"; an unfinished run has {folder / found[-1]}" if found else ""
