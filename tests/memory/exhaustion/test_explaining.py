"""What an error says when memory ran out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LayerPolicy
from fastpeft.memory.exhaustion import advice
from fastpeft.memory.exhaustion.out_of_memory import OutOfMemory
from fastpeft_kernels.common.exhaustion import is_out_of_memory
from tests.integration.models import batch, make
from tests.memory.exhaustion.exhausted import SAID


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicting fails, quickly."""

    def fail(*_: Any) -> Any:
        raise KeyError("no such thing")

    monkeypatch.setattr(advice, "prediction", fail)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("out of resource: shared memory, Required: 262144"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_it(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_it_has_what_was_predicted_and_three_changes() -> None:
    model = fastpeft.accelerate(make())
    given = batch(model, rows=4)
    hooks = len(model._forward_pre_hooks)
    with pytest.raises(torch.OutOfMemoryError) as caught, fastpeft.explain_out_of_memory(model):
        model(**given)
        torch.manual_seed(4)
        raise torch.OutOfMemoryError(SAID)
    drawn = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(drawn, torch.rand(3)), "predicting drew random numbers"
    error = caught.value
    assert isinstance(error, OutOfMemory) and str(error.__cause__) == SAID
    assert (error.phase, error.asked) == ("training step", 3 << 19)
    lines = str(error).splitlines()
    assert lines[:4] == [SAID, "", "fastpeft: memory ran out in a training step of 4 rows of 10 tokens", lines[3]]
    assert lines[3] == "predicted, as by fastpeft plan for a GPU:"
    assert [line.split("  ")[1] for line in lines[4:-4]] == [
        "base, dense", "adapters", "gradients", "optimizer", "buffers", "saved activations", "working memory",
        "of it, loss",
        "CUDA context", "fragments", "total",
    ]  # fmt: skip
    assert lines[-4] == "what would need less, the cheapest first:"
    assert [line.strip() for line in lines[-3:]] == list(error.changes)
    assert error.changes[0].startswith("batch 2 rather than 4 with more gradient accumulation, for the same result: ")
    assert all("about" in change for change in error.changes)
    assert len(model._forward_pre_hooks) <= hooks


@pytest.mark.full
def test_what_frees_as_much_as_was_asked_for_comes_first() -> None:
    model = make()
    call = advice.Call(4, 10, True)
    given = (model, call, "adamw_torch", torch.device("cpu"))
    _, least = advice.prediction(*given, 1)
    _, most = advice.prediction(*given, max(change.frees or 0 for change in least))
    assert most[0].frees == max(change.frees or 0 for change in least)
    assert any((later.frees or 0) > (first.frees or 0) for first, later in pairwise(least)), "by cost alone"


@pytest.mark.usefixtures("unplanned")
class TestWithoutPrediction:
    def test_a_failure_in_predicting_does_not_hide_the_error(self) -> None:
        model = make()
        with pytest.raises(OutOfMemory) as caught, fastpeft.explain_out_of_memory(model, optimizer="adamw_torch"):
            torch.empty(1 << 50, dtype=torch.uint8)
        said = str(caught.value)
        assert "DefaultCPUAllocator: can't allocate memory" in said and caught.value.asked == 1 << 50
        assert "no prediction: KeyError: 'no such thing'" in said
        assert caught.value.changes == (
            "a smaller batch with more gradient accumulation, for the same result",
            'activations that are not kept (LayerPolicy("recompute"))',
            "shorter rows, which cuts longer ones",  # none of its matrices is large enough for states of 8 bits
        )

    def test_a_smaller_optimizer(self) -> None:
        model = nn.Linear(64, 128, bias=False)
        with pytest.raises(OutOfMemory) as caught, fastpeft.explain_out_of_memory(model, optimizer="adamw_torch"):
            torch.empty(1 << 50, dtype=torch.uint8)
        spared = 8192 * 8 - (8192 * 2 + 2 * 8192 // 256 * 4)
        said = f"adamw_8bit rather than adamw_torch, for a little accuracy: about {spared / 2**20:.2f} MiB less"
        assert said in caught.value.changes

    def test_an_evaluation(self) -> None:
        model = make()
        with pytest.raises(OutOfMemory) as caught, fastpeft.explain_out_of_memory(model), torch.no_grad():
            model(**batch(model))
            raise torch.OutOfMemoryError(SAID)
        assert caught.value.phase == "forward pass without gradients"
        assert caught.value.changes[0].startswith("fewer than 3 rows a forward pass (per_device_eval_batch_size)")

    def test_the_optimizer(self) -> None:
        class Greedy(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                torch.empty(1 << 50, dtype=torch.uint8)

        model = make()
        optimizer = Greedy(model.parameters(), lr=1.0)
        said = pytest.raises(OutOfMemory, match="memory ran out in an optimizer step\n")
        with said, fastpeft.explain_out_of_memory(model):
            optimizer.step()
        retry = fastpeft.StepRetry(model)
        with pytest.raises(OutOfMemory, match="not run again: the optimizer was at work, and what it had changed is"):
            retry(optimizer.step)
        assert not retry.switches

    def test_once(self) -> None:
        model = make()
        explained = fastpeft.explain_out_of_memory
        with pytest.raises(OutOfMemory) as caught, explained(model), explained(model):
            raise torch.OutOfMemoryError(SAID)
        assert str(caught.value).count("fastpeft: ") == 1


def test_other_errors_and_results_pass() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="another"), fastpeft.explain_out_of_memory(model):
        raise ValueError("another")
    assert not model._forward_pre_hooks
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        fastpeft.explain_out_of_memory(None).__enter__()  # type: ignore[arg-type]
    said = pytest.raises(OutOfMemory, match="ValueError: the model was not called with input_ids of rows x tokens")
    with said, fastpeft.explain_out_of_memory(model):
        model(torch.ones(3, 2))
        raise torch.OutOfMemoryError(SAID)


def test_a_model_without_lora_has_no_prediction() -> None:
    call = advice.Call(2, 8, True)
    with pytest.raises(ValueError, match="model: expected a model of transformers with one adapter, got Linear with 0"):
        advice.prediction(nn.Linear(2, 2), call, "adamw_torch", torch.device("cpu"), None)


@pytest.mark.full
def test_policies_that_layers_have_already_are_not_proposed() -> None:
    model = fastpeft.accelerate(make(), memory=LayerPolicy("offload"))
    _, changes = advice.prediction(model, advice.Call(1, 10, True), "adamw_8bit", torch.device("cpu"), None)
    assert not any("not kept" in change.text for change in changes)
