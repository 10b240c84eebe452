"""`fastpeft train` from end to end, for each task and method, at a tiny size."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fastpeft.models.tasks import auto_class
from tests.budget import assert_within_budget
from tests.checkpoints import Checkpoints

from .runs import Case, Run, adapter, chats, classes, completions, each_trained, texts, train

QUICK = shlex.split("--max-steps 10 --batch-size 4 --learning-rate 1e-2 --logging-steps 1 --lora.r 4 --report-to none")


@dataclass(frozen=True)
class Learned(Case):
    """And what should stand in its record."""

    facts: dict[str, Any] = field(default_factory=dict)


CASES = [
    Learned("chat", "llama", chats(), "causal-lm", facts={"chat_template": "plain"}),
    Learned("completion", "llama", completions(), "causal-lm"),
    Learned("packing", "llama", chats(), "causal-lm", "--packing --max-length 64"),
    Learned("qlora", "llama", chats(), "causal-lm", "--method qlora", {"method": "qlora"}),
    Learned("plain-peft", "llama", chats(), "causal-lm", "--acceleration.enabled false", {"accelerated": ""}),
    Learned("bfloat16", "llama", chats(), "causal-lm", "--dtype bfloat16"),
    Learned(
        "eval", "llama", chats(), "causal-lm", "--eval-fraction 0.25 --eval-steps 5", {"rows": 9, "evaluation_rows": 3}
    ),
    Learned("classes", "bert", classes(), "sequence-classification", "--eval-fraction 0.34 --eval-steps 5"),
    Learned(
        "numbered-classes",
        "bert",
        [row | {"label": len(row["label"] + row["text"]) % 3} for row in classes()],
        "sequence-classification",
    ),
    Learned("t5", "t5", completions(), "seq2seq-lm", "--eval-fraction 0.25"),
    Learned("masked", "bert", texts(), "masked-lm", "--eval-fraction 0.25"),
    Learned("spans", "t5-for-spans", texts(), "seq2seq-lm", "--eval-fraction 0.25"),
]
MORE_CASES = [
    Learned("text", "llama", texts(), "causal-lm", "--max-length 16"),
    Learned("dora", "llama", chats(), "causal-lm", "--use-dora"),
    Learned("checkpointing", "llama", chats(), "causal-lm", "--gradient-checkpointing"),
    Learned("classes-by-a-decoder", "llama", classes(), "sequence-classification"),
    Learned("classes-qlora", "bert", classes(), "sequence-classification", "--method qlora"),
    Learned("pissa", "llama", chats(), "causal-lm", "--init-lora-weights pissa"),
    Learned(
        "rslora-and-biases", "llama", chats(), "causal-lm", "--use-rslora --bias lora_only --init-lora-weights gaussian"
    ),
    Learned("saved-whole", "llama", chats(), "causal-lm", "--method qlora --modules-to-save [down_proj]"),
    Learned("marian", "marian", completions(), "seq2seq-lm"),
]


done = each_trained(CASES, MORE_CASES, QUICK)


def test_it_learns_and_says_what_it_did(done: tuple[Learned, Run]) -> None:
    case, run = done
    record = run.record
    assert (record["task"], record["steps"], len(run.losses)) == (case.task, 10, 10)
    assert {name: record[name] for name in case.facts} == case.facts
    assert min(run.losses[-3:]) < run.losses[0] and torch.tensor(run.losses).isfinite().all()


def test_the_folder_holds_what_is_needed_and_no_more(done: tuple[Learned, Run]) -> None:
    _, run = done
    wanted = "README.md adapter_config.json adapter_model.safetensors config.yaml data.sha256 loss.png processes.txt"
    wanted += " report.md run.json tokenizer.json tokenizer_config.json training_args.bin"
    found = {path.name for path in run.folder.iterdir()} - {"chat_template.jinja"}
    assert {name for name in found if not name.startswith("checkpoint-")} == set(wanted.split())
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoints = sorted(name for name in found if name.startswith("checkpoint-"))
    assert "checkpoint-10" in checkpoints and len(checkpoints) <= 2


def test_the_report(done: tuple[Learned, Run]) -> None:
    case, run = done
    record, report = run.record, (run.folder / "report.md").read_text()
    assert report.startswith(f"# run\n\n{record['method']} of `{record['base']}` for {case.task}.\n")
    for line in (
        "| steps | 10 |",
        f"| training rows | {record['rows']} ({record['tokens']:,} tokens; 0 cut, 0 left out) |",
        f"| evaluation rows | {record['evaluation_rows']} |",
        f"| tokens/s | {record['tokens_per_second']:,.0f} |",
        "![loss](loss.png)",
        f"| 1 | {run.losses[0]:.4f} |  |",
    ):
        assert line in report.splitlines()
    assert ("nothing: plain PEFT" in report) == (record["accelerated"] == "")
    assert ("| chat template | plain |" in report) == (record["chat_template"] == "plain")
    for name, value in record["metrics"].items():
        assert f"| evaluation: {name} | {value:.4f} |" in report


def test_the_model_card_is_for_the_hub(done: tuple[Learned, Run]) -> None:
    from huggingface_hub import ModelCard

    case, run = done
    card = ModelCard.load(run.folder / "README.md")
    assert {"fastpeft", "lora"} <= set(card.data.tags) and card.data.base_model == run.record["base"]
    assert f"for {case.task}" in card.text and "10 steps, loss" in card.text


def test_every_layer_was_accelerated(done: tuple[Learned, Run]) -> None:
    case, run = done
    if case.id == "plain-peft":
        assert run.record["accelerated"] == ""
    else:
        _, count, _, every = run.record["accelerated"].split()[:4]
        assert int(count) == int(every) > 0


def test_evaluation(done: tuple[Learned, Run]) -> None:
    case, run = done
    record = run.record
    steps = [step for step, _ in record["evaluation"]]
    if "--eval-steps 5" in case.more:
        assert steps == [5, 10]
    elif "--eval" in case.more:
        assert steps and steps[-1] == 10
    else:
        assert steps == [] and record["metrics"] == {} and record["evaluation_rows"] == 0
        return
    assert record["metrics"]["loss"] == record["evaluation"][-1][1]
    assert ("accuracy" in record["metrics"]) == (case.task == "sequence-classification")


def test_plain_peft_loads_it_and_computes_the_same(done: tuple[Learned, Run]) -> None:
    case, run = done
    dtype = torch.bfloat16 if case.id == "bfloat16" else torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if labels := run.config["data"]["labels"]:
        options["num_labels"] = len(labels)
    if "qlora" in case.more:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        whole = json.loads((run.folder / "adapter_config.json").read_text())["modules_to_save"]
        if whole:  # what is trained whole is not quantised
            options["quantization_config"].llm_int8_skip_modules = [*whole, "lm_head"]
    base = auto_class(case.task).from_pretrained(run.record["base"], **options)
    plain = PeftModel.from_pretrained(base, run.folder).eval()
    ids = torch.randint(5, 30, (16, 9) if dtype == torch.bfloat16 else (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.task == "seq2seq-lm":
        batch["decoder_input_ids"] = torch.randint(5, 30, (2, 6))
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16),
    ):  # as the trainer left the run's
        expected, found = plain(**batch).logits, run.model.eval()(**batch).logits
    if dtype == torch.bfloat16:
        with torch.no_grad():
            assert_within_budget(found.to(dtype), expected, plain.double()(**batch).logits, "logits")
        return
    # A 4-bit layer of bitsandbytes may compute in bfloat16 on a CPU, once it is not trained.
    tolerance = 2e-2 if "qlora" in case.more else 1e-4
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    with torch.no_grad(), plain.disable_adapter():
        assert (plain(**batch).logits - expected).abs().max() > 2 * tolerance


def test_what_is_trained_is_saved_in_float32(done: tuple[Learned, Run]) -> None:
    _, run = done
    assert {value.dtype for value in adapter(run.folder).values()} == {torch.float32}


def test_the_classes_are_kept_in_the_order_of_their_numbers(done: tuple[Learned, Run]) -> None:
    case, run = done
    wanted = {"sequence-classification": ["0", "1", "2"] if case.id == "numbered-classes" else ["a", "b"]}
    assert run.config["data"]["labels"] == wanted.get(case.task)


@pytest.mark.parametrize("done", [case for case in CASES if case.id in ("chat", "masked")], indirect=True)
def test_its_configuration_trains_the_same_again(done: tuple[Learned, Run], tmp_path: Path) -> None:
    _, run = done
    again = train(tmp_path / "again", str(run.folder / "config.yaml"))
    assert again.losses == run.losses


def test_text_files_are_divided(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("some words, and more of them. " * 40)
    run = train(
        tmp_path / "run", "--model", checkpoints["llama"], "--data", str(tmp_path), "--max-length", "32", *QUICK
    )
    assert run.record["rows"] > 10 and run.record["cut"] == run.record["dropped"] == 0
    assert run.losses[-1] < run.losses[0]
