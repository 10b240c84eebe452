"""The end-to-end benchmark: sizes, work, whose losses count, and processes that crash, hang or are interrupted."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

from fastpeft.bench.finetune import __main__ as command
from fastpeft.bench.finetune import peers as peers_module
from fastpeft.bench.finetune.agreement import FACTOR, ROUNDING, agreement, difference
from fastpeft.bench.finetune.case import FinetuneCase
from fastpeft.bench.finetune.flops import Attention, attention, causal_pairs, step_flops
from fastpeft.bench.finetune.loading import move_by_a_rounding
from fastpeft.bench.finetune.peers import all_peers, choose, features, why_not
from fastpeft.bench.finetune.processes import LeftOutError, Worker
from fastpeft.bench.finetune.result import Result
from fastpeft.bench.finetune.rows import backwards, make_rows, tokens_of_batch
from fastpeft.bench.finetune.running import Plan, measure
from fastpeft.bench.finetune.sizes import CAUSAL, CLASSES, MODELS, SCALES, SEQ2SEQ, config_of, sizes_of, task_of
from fastpeft.bench.finetune.table import table
from fastpeft.bench.records import Record, RecordFile, environment, load
from tests.bench import fake_peers

CASE = FinetuneCase("qwen3-0.6b", dtype="float32", device="cpu", rows=2, tokens=8, steps=6, warmup=2, scale="tiny")
PUBLISHED = {  # parameters, heads of classifiers aside
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-4b": 3_880_263_168,  # 4,300,079,472 with what sees
    "bert-base": 109_482_240,
    "roberta-base": 124_645_632,
    "t5-base": 222_903_552,
    "flan-t5-base": 222_903_552,  # and a head, which transformers 5 ties
    "bart-base": 139_420_416,
}
QUICK = ("llama-3.1-8b", "bert-base", "t5-base")


def build(model: str, scale: str, **settings: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    sizes = sizes_of(model, scale)
    kinds = {CAUSAL: AutoModelForCausalLM, CLASSES: AutoModel, SEQ2SEQ: AutoModelForSeq2SeqLM}
    return kinds[task_of(sizes.kind)].from_config(config_of(sizes, 16), **settings)


class TestSizes:
    @pytest.mark.parametrize(
        "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in MODELS]
    )
    def test_as_many_parameters_as_published(self, name: str) -> None:
        with torch.device("meta"):
            model = build(name, "full")
        own_head = name == "flan-t5-base"
        counted = [each.numel() for path, each in model.named_parameters() if not (own_head and "lm_head" in path)]
        assert sum(counted) == PUBLISHED[name]

    def test_smaller_scales_keep_the_shape(self) -> None:
        full, small = MODELS["llama-3.1-8b"], sizes_of("llama-3.1-8b", "small")
        assert small.inner / small.hidden == full.inner / full.hidden and small.heads // small.key_heads == 4
        assert sizes_of("llama-3.1-8b", "full", layers=3) == replace(full, layers=3)
        for name in MODELS:
            tiny = SCALES["tiny"](MODELS[name])
            assert (tiny.layers, tiny.words, tiny.heads % tiny.key_heads) == (2, 512, 0)

    def test_rows_longer_than_published_positions(self) -> None:
        assert config_of(sizes_of("roberta-base", "tiny"), 1024).max_position_embeddings == 1026


class TestFlops:
    def test_a_decoder_by_hand(self) -> None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(build("llama-3.1-8b", "tiny"), LoraConfig(r=4, target_modules=["q_proj"]))
        batch = {name: each for name, each in make_rows(CAUSAL, 512, 3, 8).items()}
        h, inner, words, kv, rank = 64, 224, 512, 16, 4
        layer = 2 * h * h + 2 * h * kv + 3 * h * inner
        products = 3 * 8 * (4 * (2 * layer + h * words) + 6 * 2 * (h * rank + rank * h))
        assert step_flops(model, batch) == products + 12 * 3 * 2 * (8 * 9 // 2) * 64

    def test_an_encoder_as_pytorch_counts_its_forward(self) -> None:
        model = build("bert-base", "tiny", attn_implementation="eager").requires_grad_(False)
        batch = make_rows(CLASSES, 512, 3, 8)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        products, pairs = 4 / 2, 12 / 4  # of forward and backward, over forward alone
        seen = 3 * 2 * 8 * 8 * 64 * 4
        hooked = step_flops(_Labelled(model), {**inputs, "labels": batch["labels"]})
        assert hooked == products * (counter.get_total_flops() - seen) + pairs * seen

    def test_windows_and_both_stacks(self) -> None:
        assert causal_pairs(5) == 15 and causal_pairs(5, 2) == 9 and causal_pairs(3, 9) == 6
        found = list(attention(config_of(sizes_of("t5-base", "tiny"), 16), 8, 2, True))
        assert found == [Attention(2, 64, 64), Attention(2, 3, 64), Attention(2, 16, 64)]
        config = config_of(replace(MODELS["gemma-3-4b"], layers=6), 4096)
        pairs = [each.pairs for each in attention(config, 4096, 4096, True)]
        assert pairs == [causal_pairs(4096, 1024)] * 5 + [causal_pairs(4096)]

    def test_a_decoder_without_shared_keys_is_causal(self) -> None:
        config = GPT2Config(n_layer=2, n_head=4, n_embd=64)
        assert list(attention(config, 8, 8, True)) == [Attention(1, 36, 64)] * 2
        assert list(attention(config, 8, 8, False)) == [Attention(2, 64, 64)]


class _Labelled(torch.nn.Module):
    """A model that takes labels and does nothing with them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, labels: Any, **batch: Any) -> Any:
        return self.model(**batch)


RUNS = {"peft exact": [4.0, 2.0], "peft": [4.0, 2.0 * (1 + 1e-5)], "peft again": [4.0, 2.0 * (1 - 2e-5)]}


class TestAgreement:
    def test_twice_the_further_of_pefts_own_is_the_limit(self) -> None:
        found = agreement([4.0, 2.0 * (1 + 3.9e-5)], RUNS)
        assert found and found.holds
        assert found.allowed == pytest.approx(FACTOR * 2e-5 + ROUNDING, rel=1e-6)
        assert found.from_peft == pytest.approx(2.9e-5, rel=1e-4)
        found = agreement([4.0, 2.0 * (1 + 4.2e-5)], RUNS)
        assert found and not found.holds

    def test_no_number_and_missing_steps_never_agree(self) -> None:
        for losses in ([4.0, math.nan], [4.0, math.inf], [4.0], []):
            found = agreement(losses, RUNS)
            assert found and not found.holds and difference(losses, losses[:1]) in (0.0, math.inf)

    def test_without_the_wider_run_pefts_own_is_the_reference(self) -> None:
        runs = {name: losses for name, losses in RUNS.items() if name != "peft exact"}
        found = agreement([4.0, 2.0 * (1 + 1e-4)], runs)
        assert found and not found.holds and found.allowed == pytest.approx(6e-5, rel=0.02)

    def test_nothing_to_compare_with(self) -> None:
        assert agreement([1.0], {}) is None
        assert agreement([1.0], {"peft exact": [1.0]}) is None
        assert agreement([1.0], {"peft": [1.0]}) is None
        assert agreement([1.0], {**RUNS, "peft": [math.nan, 1.0]}) is None


class TestRows:
    def test_the_same_each_time_and_reversed_in_batches_alone(self) -> None:
        rows = make_rows(CAUSAL, 300, 6, 12)
        assert torch.equal(rows["input_ids"], make_rows(CAUSAL, 300, 6, 12)["input_ids"])
        assert int(rows["input_ids"].min()) >= 4 and int(rows["input_ids"].max()) < 300
        assert rows["input_ids"][:, 8:].eq(rows["input_ids"][:, :-8]).float().mean() > 0.3
        order = [1, 0, 3, 2, 5, 4]
        assert all(torch.equal(each, rows[name][order]) for name, each in backwards(rows, 2).items())

    def test_labels(self) -> None:
        assert make_rows(CLASSES, 50, 4, 8)["labels"].shape == (4,)
        assert make_rows(SEQ2SEQ, 50, 4, 8)["labels"].shape == (4, 2)
        assert (tokens_of_batch(SEQ2SEQ, 4, 8), tokens_of_batch(CAUSAL, 4, 8)) == (40, 32)


class TestPeers:
    def test_each_feature_of_accelerate_is_taken_away_once(self) -> None:
        import fastpeft

        assert features() == ["lora", "mlp", "attention", "loss", "norms"]
        for name in features():
            assert all_peers()[f"fastpeft without {name}"].switches == ((name, False),)
            fastpeft.accelerate(torch.nn.Linear(2, 2), **{name: False})

    def test_the_runs_that_tell_correctness_are_always_there(self) -> None:
        assert [peer.name for peer in choose(["fastpeft"])] == ["peft exact", "peft", "peft again", "fastpeft"]
        assert [peer.name for peer in choose(None)] == list(all_peers())
        with pytest.raises(ValueError, match=r"peers: expected one of peft exact, .*; got 'pefft'"):
            choose(["pefft"])

    def test_other_roundings_are_the_same_computation(self) -> None:
        peft, again = all_peers()["peft"], all_peers()["peft again"]
        assert peft.other_roundings == (replace(peft, backwards=True), replace(peft, moved=True))
        assert not again.other_roundings[0].backwards

    def test_parameters_are_moved_by_a_rounding_and_no_more(self) -> None:
        layer = torch.nn.Linear(50, 40)
        layer.bias.requires_grad_(False).fill_(3.0)
        with torch.no_grad():
            layer.weight[0] = 0.0
        before = copy.deepcopy(layer)
        move_by_a_rounding(layer)
        moved = (layer.weight[1:] / before.weight[1:] - 1).abs()
        assert moved.min() > 0 and moved.max() <= 2 * torch.finfo(torch.float32).eps
        assert torch.equal(layer.weight[0], before.weight[0]) and torch.equal(layer.bias, before.bias)

    def test_who_cannot_run_and_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = all_peers()
        monkeypatch.setattr(peers_module, "find_spec", lambda name: None if name == "unsloth" else name)
        gpu = replace(CASE, device="cuda")
        assert why_not(known["unsloth"], gpu, CAUSAL) == "unsloth is not installed"
        assert why_not(known["peft + liger"], CASE, CAUSAL) == "needs a GPU"
        assert why_not(known["peft + liger"], gpu, SEQ2SEQ) == "has no kernels for seq2seq-lm models"
        assert why_not(known["fastpeft + trl"], gpu, CLASSES) == "takes decoders only"
        allowed = [name for name, peer in known.items() if why_not(peer, gpu, CAUSAL) is None]
        assert allowed == [name for name in known if name != "unsloth"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("method", "dora", "method: expected one of lora, qlora, got 'dora'"),
        ("dtype", "int8", "dtype: expected one of bfloat16, float16, float32, got 'int8'"),
        ("rows", 0, "rows: expected at least 1, got 0"),
        ("layers", 0, "layers: expected at least 1, got 0"),
        ("threads", 0, "threads: expected at least 1, got 0"),
        ("steps", 1, "steps: expected at least 2, got 1"),
        ("learning_rate", float("nan"), "learning_rate: expected a number above 0, got nan"),
        ("warmup", 6, "warmup: expected 1 to 5, one less than steps, got 6"),
    ],
)
def test_a_case_that_is_none(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CASE, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rounds", 0, "rounds: expected at least 1, got 0"),
        ("step_rounds", -1, "step_rounds: expected at least 0, got -1"),
        ("limit_s", float("nan"), "limit_s: expected at least 1, got nan"),
    ],
)
def test_a_plan_that_is_none(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{name: value})


class TestProcesses:
    def ask(self, tmp_path: Path, question: str, limit_s: float = 60.0) -> str:
        """Why there is no answer; the process is gone afterwards."""
        with Worker(fake_peers.obeying, None, tmp_path / "log", 60.0) as worker:
            pid = worker.ask("pid")
            worker.limit_s = limit_s
            with pytest.raises(LeftOutError) as caught:
                worker.ask(question)
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z"
        assert f"asked to {question}" in (tmp_path / "log").read_text()
        return str(caught.value)

    def test_a_crash(self, tmp_path: Path) -> None:
        assert self.ask(tmp_path, "crash") == "ended with code 3"

    def test_a_failure(self, tmp_path: Path) -> None:
        assert self.ask(tmp_path, "fail") == "ValueError: rows: expected some"
        assert "Traceback" in (tmp_path / "log").read_text()

    def test_a_hang(self, tmp_path: Path) -> None:
        start = time.monotonic()
        assert self.ask(tmp_path, "hang", limit_s=0.5) == "no answer in 0 s"
        assert time.monotonic() - start < 30


class Measured:
    """A benchmark of fake peers, and the records that it left."""

    def __init__(self, tmp_path: Path, peers: list[str], **plan: Any) -> None:
        self.said: list[str] = []
        self.file = RecordFile(tmp_path / "out.jsonl", environment("cpu"))
        self.plan = Plan(limit_s=60.0, logs=tmp_path / "logs", **plan)
        self.peers = choose(peers)

    def __call__(self) -> Result:
        add = lambda **fields: self.file.add(suite="finetune", **fields)  # noqa: E731
        return measure(CASE, self.peers, self.plan, add, self.say, fake_peers.find, fake_peers.train)

    def say(self, line: str) -> None:
        self.said.append(line)

    def records(self) -> dict[tuple[str, str, str], Record]:
        return {(record.op, record.peer, record.metric): record for record in load(self.file.path)}


@pytest.mark.parametrize("together", [False, True])
def test_times_only_of_those_who_agree(together: bool, tmp_path: Path) -> None:
    measured = Measured(
        tmp_path,
        ["fastpeft", "trl", "unsloth", *(f"fastpeft without {x}" for x in features())],
        step_rounds=2,
        together=together,
    )
    result, records = measured(), measured.records()
    assert result.exit_code == 1
    assert set(result.left_out) == {"unsloth", "trl", *(f"fastpeft without {x}" for x in ("loss", "lora", "norms"))}
    assert result.failed == set(result.left_out) - {"unsloth"}
    time_of = records["run", "fastpeft", "time"]
    assert (time_of.samples, time_of.error) == ([10.0] * 4, pytest.approx(3e-6))
    assert time_of.budget == pytest.approx(2 * 2e-6 + ROUNDING) and time_of.settings["flops"] == fake_peers.FLOPS
    assert records["run", "fastpeft", "speed"].median == pytest.approx(16 / 0.010)
    assert records["run", "fastpeft", "model FLOPs utilisation"].median == pytest.approx(4e9 / 0.010 / 2e12)
    first = records.get(("run", "fastpeft", "time to first step"))
    assert first is None if together else first and first.median == 5.0
    assert records["run", "fastpeft", "loss"].samples == pytest.approx([5.0, 4.9, 4.8, 4.7, 4.6, 4.5], rel=1e-5)
    assert records["step", "fastpeft", "time"].samples == [10.0, 10.0]
    assert records["step", "peft", "time"].samples == [20.0, 20.0]
    assert records["ceiling", "torch", "rate"].case in ("copy", "matrix float32")
    loss = "fastpeft without loss"
    assert "losses differ from PEFT's: by 1.0e-03 of the reference, where" in result.left_out[loss]
    assert records["run", loss, "left out"].settings["reason"] == result.left_out[loss]
    assert ("run", loss, "time") not in records and ("run", loss, "final loss") in records
    assert records["run", "fastpeft without lora", "left out"].settings["reason"] == "ended by signal 6"
    assert records["run", "fastpeft without norms", "left out"].settings["reason"] == "out of memory"
    assert records["run", "trl", "left out"].settings["reason"] == "not of this machine"
    again = [line.partition(": losses differ by 1.0e-03; once more, ") for line in measured.said]
    tries = ("rows in another order", "trained parameters moved by one rounding")
    unlucky_once, unlucky_twice = fake_peers.UNLUCKY
    assert {name: [how for peer, _, how in again if how and peer == name] for name, _, how in again if how} == {
        unlucky_once: [tries[0]],
        unlucky_twice: [*tries],
        loss: [*tries],  # which is wrong
    }
    assert all(records["run", name, "time"].error == pytest.approx(3e-6) for name in fake_peers.UNLUCKY)
    lines = {line[:26].strip(): line for line in table(result).splitlines()}
    assert lines["fastpeft"].split()[1:3] == ["10.0", "0.500"] and "left out: out of memory" in table(result)


def test_rounds_in_turn_and_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    measured = Measured(tmp_path, ["fastpeft"], rounds=2)

    def say(line: str) -> None:
        measured.said.append(line)
        if len(measured.said) == 6:  # the second round: fastpeft, then PEFT backwards
            raise KeyboardInterrupt

    measured.say = say  # type: ignore[method-assign]
    result, records = measured(), measured.records()
    assert result.exit_code == 130
    assert [line.partition(":")[0] for line in measured.said[:6]] == [
        *("peft exact", "peft", "peft again", "fastpeft", "fastpeft", "peft again"),
    ]
    assert len(records["run", "fastpeft", "time"].samples) == 8
    assert len(records["run", "peft", "time"].samples) == 4


def test_ours_that_fails_is_the_only_failure(tmp_path: Path) -> None:
    result = Result(CASE, failed={"torch.compile", "trl"})
    assert result.exit_code == 0
    result.failed.add("fastpeft without lora")
    assert result.exit_code == 1


@pytest.mark.full
@pytest.mark.parametrize(
    "more",
    [["--method", "qlora"], ["--model", "t5-base"], ["--model", "bert-base"], ["--dtype", "bfloat16"]],
)
def test_a_real_run_of_two(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    sizes = ["--scale", "tiny", "--rows", "2", "--tokens", "16", "--steps", "4", "--warmup", "1", "--threads", "1"]
    peers = ["--step-rounds", "2", "--shared-imports", "--peers", "fastpeft", "fastpeft without lora", "trl"]
    assert command.main([*sizes, *peers, *more, "--device", "cpu", "--out", str(path)]) == 0, capsys.readouterr().out
    records = {(record.op, record.peer, record.metric): record for record in load(path)}
    assert records["run", "fastpeft", "speed"].median > 0 and records["step", "fastpeft", "time"].median > 0
    assert 0 < records["run", "peft", "model FLOPs utilisation"].median < 1
    assert (
        records["run", "fastpeft", "trained parameters"].median == records["run", "peft", "trained parameters"].median
    )
