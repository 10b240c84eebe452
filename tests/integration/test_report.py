"""`report` says in words what is the case; all public functions say what was wrong with what they got."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fastpeft
from tests.integration.blocks import inputs, pair
from tests.integration.models import batch, make, make_base
from tests.integration.reports import adapter_rows, shape_of
from tests.integration.steps import step


class TestErrors:
    @pytest.mark.parametrize("function", [fastpeft.accelerate, fastpeft.restore, fastpeft.report, fastpeft.verify])
    def test_not_a_module(self, function: Callable[[Any], Any]) -> None:
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
            function({})

    def test_not_accelerated(self) -> None:
        with pytest.raises(ValueError, match=r"no accelerated layer.*accelerate\(model\) first"):
            fastpeft.verify(make())

    def test_no_batch_to_be_made_up(self) -> None:
        ours, _ = pair()
        with pytest.raises(ValueError, match=r"batch: .* pass a batch"):
            fastpeft.verify(ours)


class TestReport:
    @pytest.mark.parametrize("name", ["llama", "t5"])
    def test_a_default_device_changes_nothing(self, name: str) -> None:
        """Trials make numbers of their own: on the default device they had none, or a generator of another one."""
        model, other = make(name), make(name)
        with torch.device("meta"):
            before = fastpeft.report(other)
            fastpeft.accelerate(other)
        assert before.rows == fastpeft.report(model).rows
        assert fastpeft.report(other).rows == fastpeft.report(fastpeft.accelerate(model)).rows

    def test_before_accelerating(self) -> None:
        report = fastpeft.report(make())
        assert not report.accelerated and {row.note for row in report.left} == {"not accelerated yet"}
        assert "not accelerated: call fastpeft.accelerate" in str(report)

    def test_without_an_adapter(self) -> None:
        """A script that trains all weights, or accelerates before `get_peft_model`, asks why so little was done."""
        model = fastpeft.accelerate(make_base("bert"))
        assert "attach one first, if wanted, then call fastpeft.accelerate(model) again" in str(fastpeft.report(model))
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
        report = fastpeft.report(adapted)
        assert "attach one first" not in str(report)
        assert {row.note for row in report.rows if row.kind == "lora"} == {"not accelerated yet"}
        assert "attach one first" not in str(fastpeft.report(fastpeft.accelerate(adapted)))

    def test_before_and_after_the_first_forward(self) -> None:
        model = fastpeft.accelerate(make())
        assert "found at the first forward pass" in str(fastpeft.report(model))
        step(model, batch(model))
        text = str(fastpeft.report(model))
        assert "found at the first forward pass" not in text
        wanted = "14 of 14 adapter layers accelerated, 2 of 2 MLPs as one op, 2 of 2 attentions, "
        wanted += "7 of 7 norms and rotary embeddings, 1 of 1 losses without logits\n"
        assert text.startswith(f"fastpeft: {wanted}")
        assert re.search(r"layers\.\*\.self_attn\.q_proj +2 +lora_linear +one of 3", text)

    def test_what_was_switched_off(self) -> None:
        switches = {"lora": False, "mlp": False, "attention": False, "norms": False, "loss": False}
        model = fastpeft.accelerate(make(), **switches)
        report = fastpeft.report(model)
        assert {row.note for row in report.left} == {f"{name}=False" for name in switches if name != "mlp"}
        assert not report.accelerated

    def test_calls_that_peft_served(self) -> None:
        ours, _ = pair()
        ours(inputs())
        with ours.disable_adapter():
            ours(inputs())
        assert {row.note for row in adapter_rows(ours)} == {"1 of 2 calls by PEFT: adapters disabled"}

    def test_an_empty_model(self) -> None:
        report = fastpeft.report(nn.Linear(2, 2))
        assert not report.rows and str(report)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_as_json(self, name: str) -> None:
        model = fastpeft.accelerate(make(name))
        model(**batch(model))
        report = fastpeft.report(model)
        assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
        assert len(report.to_dict()["rows"]) == len(report.accelerated) + len(report.left)

    def test_never_changes_the_model(self) -> None:
        model = fastpeft.accelerate(make())
        step(model, batch(model))
        shape = shape_of(model)
        str(fastpeft.report(model))
        assert shape_of(model) == shape
