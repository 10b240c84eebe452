"""`fastpeft train` under each memory policy: the same losses and adapters to the last bit."""

from __future__ import annotations

import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.cli import app
from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.memory.plan.planning import Plan
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.memory.streaming.layer import StreamedLayer
from fastpeft.training import memory as training_memory
from fastpeft.training.checkpoints import is_whole
from fastpeft.training.memory import Decision, check_memory, decide, fixed
from tests.checkpoints import Checkpoints, write_rows
from tests.processes import Forked

from .runs import Run, adapter, chats, completions, interrupted, texts, train
from .test_resume import assert_same

RUN = shlex.split(
    "--learning-rate 1e-2 --logging-steps 1 --lora.r 4 --lora.dropout 0.2 --report-to none --batch-size 2 --epochs 2 "
    "--gradient-accumulation-steps 2 --eval-fraction 0.25 --eval-steps 2 --save-steps 100"
)
POLICIES = {
    "streamed": "--streamed",
    "offload-streamed": "--activations offload --streamed --ring 1",
    "offload": "--activations offload",
    "recompute": "--activations recompute --decoded 1MiB",
    "selective": "--activations selective",
    "checkpointing": "--gradient-checkpointing",
}
KINDS = {
    "chats": ("llama", chats(), ""),
    "packed": ("llama", chats(40), "--packing --max-length 64"),
    "qlora": ("llama", chats(), "--method qlora"),
    "t5": ("t5", completions(), ""),
    "bert": ("bert", texts(), ""),
}


def arguments(kind: str, checkpoints: Checkpoints, folder: Path) -> list[str]:
    name, rows, more = KINDS[kind]
    return ["--model", checkpoints[name], "--data", write_rows(folder / "rows.jsonl", *rows), *RUN, *more.split()]


@pytest.fixture(scope="module")
def plain(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Run]:
    folder = tmp_path_factory.mktemp("plain")
    given = arguments("chats", checkpoints, folder)
    return given, train(folder / "run", *given)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of these models are small."""
    monkeypatch.setattr("fastpeft.memory.streaming.stowing.SMALLEST", 16)


def policies(*regular: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in regular else pytest.mark.full) for name in POLICIES]


@pytest.mark.parametrize("policy", policies("offload-streamed"))
def test_the_same_run_resumed_too(policy: str, plain: tuple[list[str], Run], tmp_path: Path) -> None:
    """Broken off under the policy, and resumed under it; with dropout, accumulation, and evaluation between."""
    given, wanted = plain
    interrupted(tmp_path / "run", *given, *POLICIES[policy].split(), at=3)
    found = train(tmp_path / "run", "--resume")
    assert_same(found, wanted)
    streams = [isinstance(module, StreamedLayer) for module in found.model.modules()]
    assert any(streams) == ("streamed" in policy)
    report = (found.folder / "report.md").read_text()
    assert (policy == "checkpointing") != ("## Memory" in report and "every layer" in found.record["memory"])
    from peft import AutoPeftModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(found.folder)  # plain PEFT
    values = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "lora_" in n}
    saved = adapter(found.folder)
    assert values.keys() == saved.keys() and all(torch.equal(values[name], saved[name]) for name in saved)


def killed_at_save(folder: Path, *given: str, number: int) -> None:
    """A run in a process of its own, which is killed when half of its adapter of that number is on the disk."""

    def work() -> int:
        import peft.peft_model

        save, saved = peft.peft_model.safe_save_file, iter(range(1, 100))

        def half(tensors: Any, filename: str, **more: Any) -> None:
            save(tensors, filename, **more)
            if next(saved) == number:
                os.truncate(filename, os.path.getsize(filename) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        peft.peft_model.safe_save_file = half  # type: ignore[assignment]
        return app.run(["train", "--quiet", "--output-dir", str(folder), *given])

    assert Forked(work).wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("policy", "number", "left"),
    [
        ("offload-streamed", 2, [2]),
        *(pytest.param(policy, number, left, marks=pytest.mark.full)
          for policy in ("offload", "streamed") for number, left in ((1, []), (2, [2]), (4, [4, 6]))),
    ],
)  # fmt: skip
def test_killed_while_it_saves(
    policy: str, number: int, left: list[int], plain: tuple[list[str], Run], tmp_path: Path
) -> None:
    """In the first, the second checkpoint, and the finished adapter: what is half there is never taken for whole."""
    given, wanted = plain
    folder, more = tmp_path / "run", ["--save-steps", "2", "--save-total-limit", "2"]
    killed_at_save(folder, *given, *POLICIES[policy].split(), *more, number=number)
    assert not (folder / "adapter_model.safetensors").exists()
    whole = [place for place in (2, 4, 6) if is_whole(folder / f"checkpoint-{place}")]
    assert whole == left and len(list(folder.rglob("adapter_model.safetensors"))) == len(left) + 1
    again = ["--resume"] if left else [*given, *POLICIES[policy].split(), "--resume-or-begin"]
    assert_same(train(folder, *again), wanted)


@pytest.mark.full
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "chats"])
@pytest.mark.parametrize("policy", policies())
def test_other_runs(kind: str, policy: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Where layers share a tensor, as a decoder's do the encoder's result, checkpointing adds gradients up in another
    order, plain PEFT's too: there one way of checkpointing is held to another."""
    given = arguments(kind, checkpoints, tmp_path)
    like = ["--gradient-checkpointing"] if kind == "t5" and policy not in ("streamed", "selective") else []
    wanted = train(tmp_path / "plain", *given, *like)
    assert_same(train(tmp_path / "run", *given, *POLICIES[policy].split()), wanted)


@pytest.mark.full
def test_resumed_in_another_way(plain: tuple[list[str], Run], tmp_path: Path) -> None:
    """A policy changes no step, so a run may go on under another one."""
    given, wanted = plain
    interrupted(tmp_path / "run", *given, "--activations", "offload", at=3)
    assert_same(train(tmp_path / "run", "--resume", "--activations", "null", "--streamed"), wanted)


@pytest.mark.full
def test_a_budget(plain: tuple[list[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastpeft.cli import app

    given, wanted = plain
    found = train(tmp_path / "run", *given, "--budget-gib", "2")
    assert_same(found, wanted)
    assert found.record["predicted_mib"] > 512 and "predicted, of 2.00 GiB" not in found.record["memory"]
    assert "predicted peak" in (found.folder / "report.md").read_text() and "it fits" in found.record["memory"]
    capsys.readouterr()
    wrong = ["train", "--quiet", "--output-dir", str(tmp_path / "no"), *given, "--budget-gib", "0.1"]
    assert app.run(wrong) == 2 and not (tmp_path / "no").exists()
    assert "memory.budget_gib: expected at least 0." in capsys.readouterr().err


GIVEN = {"model": {"name": "m", "task": "causal-lm"}, "data": {"max_length": 64}}


def config(**memory: Any) -> FastpeftConfig:
    return FastpeftConfig.from_dict({**GIVEN, "memory": memory})


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `decide` asks of the planner, which answers with 3 GiB, and a GPU with 8 GiB free."""
    asked: dict[str, Any] = {}

    def answer(config: Any, capacity: int, policy: Any, **_: Any) -> Plan:
        from fastpeft.memory.plan.choosing import Need

        asked.update(capacity=capacity, policy=policy)
        chosen = policy or MemoryPolicy((LayerPolicy("recompute"), LayerPolicy()))
        need = Need(chosen, 0, 0, "loss", 0, 0, 0, 3 << 30, 0, 1.0)
        fits = capacity >= 3 << 30
        return Plan("m", fits, capacity, None, {}, {}, need, None, None, () if fits else ("a GPU of 3 GiB",), (), ())

    monkeypatch.setattr(training_memory, "_planned", answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 16 << 30))
    return asked


def decided(device: str = "cuda", processes: int = 1, **memory: Any) -> Decision:
    given = config(**memory)
    check_memory(given)
    return decide(given, torch.device(device), torch.bfloat16, longest=64, processes=processes)


def test_who_decides(planned: dict[str, Any]) -> None:
    assert decided("cpu") == Decision() and decided("cpu").summary == "" and not planned
    assert decided("cpu", activations="offload").summary == "every layer offload"
    assert decided(gradient_checkpointing=True) == Decision() and not planned
    chosen = decided()
    assert planned == {"capacity": 8 << 30, "policy": None} and chosen.policy == chosen.plan.policy  # type: ignore[union-attr]
    assert chosen.summary == "0 recompute, 1 keep; 3.00 GiB predicted, of 8.00 GiB"
    assert decided("cpu", budget_gib=4).policy == chosen.policy and planned["capacity"] == 4 << 30
    assert decided(budget_gib=4, gradient_checkpointing=True).policy is None
    assert planned["policy"] == MemoryPolicy(LayerPolicy("recompute"))
    said = decided(budget_gib=4, streamed=True, ring=3)
    assert planned["policy"] == said.policy == MemoryPolicy(LayerPolicy("keep", streamed=True), ring=3) and said.streams


def test_what_does_not_fit(planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"expected at least 3.00 GiB, .*, got 2; or a GPU of 3 GiB$"):
        decided(budget_gib=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 16 << 30))
    assert decided().note == "this run may not fit: 3.00 GiB are predicted, 1.00 GiB are free"


def test_what_cannot_be_planned(planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Plan:
        raise ValueError("no such thing")

    monkeypatch.setattr(training_memory, "_planned", fails)
    assert decided() == Decision(note="memory was not planned: no such thing")
    with pytest.raises(UserError, match=r"^memory\.budget_gib: no such thing$"):
        decided(budget_gib=2)


def test_several_processes_do_not_stream() -> None:
    with pytest.raises(UserError, match=r"memory\.streamed: expected false where several processes train together"):
        decided("cpu", processes=2, streamed=True)


def test_keys_of_the_section() -> None:
    section = config(activations="selective", decoded="1MiB").memory
    assert fixed(section) == MemoryPolicy(LayerPolicy("selective"), decoded=1 << 20)
    assert fixed(replace(section, activations=None)) is None
