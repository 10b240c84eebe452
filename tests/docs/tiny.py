"""What hidden lines of the pages take as given: a small model, a batch, files to train on."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .snippets import SHIPPED_MODEL

PREFERENCES = {"prompt": "What is a list?", "chosen": " A mutable sequence.", "rejected": " A kind of dictionary."}


def __getattr__(name: str) -> Any:
    """Made anew for each page: `base_model`, `tokenizer`, and `model` with an adapter."""
    if name == "base_model":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL)
    if name == "tokenizer":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    if name == "model":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(__getattr__("base_model"), adapter)
    raise AttributeError(name)


def batch(rows: int = 2, tokens: int = 16) -> dict[str, torch.Tensor]:
    """Token ids with labels."""
    ids = torch.randint(3, 3000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def rows(count: int = 4, tokens: int = 16) -> list[dict[str, torch.Tensor]]:
    """A dataset of `batch`'s rows, for Trainer."""
    whole = batch(count, tokens)
    return [{name: value[i] for name, value in whole.items()} for i in range(count)]


def write_json_lines(path: str, *records: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


@contextlib.contextmanager
def interrupted_after(steps: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Each run of `fastpeft train` in here gets a signal after so many steps, as if someone had pressed Ctrl-C."""
    from fastpeft.training.stopping import StopOnSignal

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == steps - 1:
            signal.raise_signal(number)

    with mock.patch.object(StopOnSignal, "on_step_begin", on_step_begin):
        yield


def same_adapter(one: str, other: str) -> bool:
    """Whether two runs ended with the same numbers, to the last bit."""
    from safetensors.torch import load_file

    first, second = (load_file(Path(run, "adapter_model.safetensors")) for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_shape(shown: Any, real: Any) -> bool:
    """Whether JSON on a page has the keys and types that a command prints; of lists the first elements count."""
    if isinstance(shown, dict) and isinstance(real, dict):
        return shown.keys() == real.keys() and all(same_shape(shown[name], real[name]) for name in shown)
    if isinstance(shown, list) and isinstance(real, list):
        return not shown or (bool(real) and same_shape(shown[0], real[0]))
    return type(shown) is type(real)
