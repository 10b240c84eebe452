"""Tags, answers, several classes and numbers from end to end: train, reload in plain PEFT, generate, verify, merge."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from fastpeft.cli import app
from fastpeft.models.tasks import auto_class
from tests.checkpoints import Checkpoints, wordpieces, write_rows

from .heads import numbered, questions, several, tagged
from .runs import Case, Run, each_trained, train

QUICK = shlex.split("--max-steps 8 --batch-size 4 --learning-rate 1e-2 --logging-steps 1 --lora.r 4 --report-to none")
TAGS = ["B-LOC", "B-PER", "O"]


@dataclass(frozen=True)
class Headed(Case):
    """And what should come of it.

    Attributes:
        metric: a figure of the report.
        head: name of the fresh module.
        options: of `from_pretrained`, for the same head.
        line: a row without its label.
    """

    metric: str = ""
    head: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    line: dict[str, Any] = field(default_factory=dict)


TOKENS = Headed(
    "tags",
    "bert",
    tagged(),
    "token-classification",
    metric="F1 of the entities",
    head="classifier",
    options={"num_labels": 3},
    line={"tokens": ["ann", "rome"]},
)
ANSWERS = Headed(
    "answers",
    "bert",
    questions(),
    "question-answering",
    metric="exact match",
    head="qa_outputs",
    line={"question": "who?", "context": "x y ann"},
)
CLASSES = Headed(
    "several-classes",
    "bert",
    several(),
    "sequence-classification",
    metric="F1, mean of the classes",
    head="classifier",
    options={"num_labels": 4},
    line={"text": "ann rome"},
)
NUMBER = Headed(
    "numbers",
    "bert",
    numbered(),
    "sequence-classification",
    metric="Pearson's correlation",
    head="classifier",
    options={"num_labels": 1},
    line={"text": "a a", "text_pair": "b"},
)
DECODERS = [
    replace(case, id=f"{case.id}-by-a-decoder", model="llama", head="score") for case in (TOKENS, CLASSES, NUMBER)
]
QLORA = [replace(case, id=f"{case.id}-qlora", more="--method qlora") for case in (TOKENS, ANSWERS)]


done = each_trained([TOKENS, ANSWERS], [CLASSES, NUMBER, *DECODERS, *QLORA], ["--eval-fraction", "0.25", *QUICK])


def test_it_learns_and_is_measured(done: tuple[Headed, Run]) -> None:
    case, run = done
    record = run.record
    assert record["task"] == case.task and min(run.losses[-3:]) < run.losses[0]
    assert record["evaluation"][-1][1] > 0, "the loss of the evaluation"
    metric = {metric["name"]: metric for metric in record["findings"]["metrics"]}[case.metric]
    assert metric["rows"] == 4 and metric["low"] <= metric["value"] <= metric["high"]
    _, count, _, every = record["accelerated"].split()[:4]
    assert int(count) == int(every) > 0


def test_the_head_is_saved_whole_and_has_no_adapter(done: tuple[Headed, Run]) -> None:
    case, run = done
    with safe_open(run.folder / "adapter_model.safetensors", "pt") as saved:
        names = [name for name in saved.keys() if case.head in name]  # noqa: SIM118
    assert names and not any("lora" in name for name in names)
    whole = json.loads((run.folder / "adapter_config.json").read_text())["modules_to_save"]
    assert case.head in whole and len(set(whole)) == len(whole)


def outputs(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return torch.cat([found.start_logits, found.end_logits]) if "start_logits" in found else found.logits


def test_plain_peft_and_merged_models_compute_the_same(done: tuple[Headed, Run], tmp_path: Path) -> None:
    case, run = done
    ours = outputs(run.model)
    if not case.more:
        base = auto_class(case.task).from_pretrained(run.record["base"], **case.options)
        plain = PeftModel.from_pretrained(base, run.folder)
        torch.testing.assert_close(outputs(plain), ours, atol=1e-5, rtol=1e-4)
    assert app.run(["merge", str(run.folder), str(tmp_path / "merged"), "--dtype", "float32", "--quiet"]) == 0
    merged = auto_class(case.task).from_pretrained(tmp_path / "merged")
    tolerance = 2e-2 if case.more else 1e-5  # a layer of 4 bits may compute in bfloat16 on a CPU
    torch.testing.assert_close(outputs(merged), ours, atol=tolerance, rtol=max(1e-4, tolerance))
    if case.task == "token-classification":
        assert merged.config.id2label == dict(enumerate(TAGS))


def test_verify_passes(done: tuple[Headed, Run], capsys: pytest.CaptureFixture[str]) -> None:
    _, run = done
    assert app.run(["verify", str(run.folder), "--quiet"]) == 0, capsys.readouterr().out
    assert "fastpeft verify: passed" in capsys.readouterr().out


def test_generate_answers(done: tuple[Headed, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, run = done
    file = write_rows(tmp_path / "prompts.jsonl", case.line)
    assert app.run(["generate", str(run.folder), "--file", file, "--quiet"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first.items() >= case.line.items()
    if case.task == "token-classification":
        assert len(first["tags"]) == 2 and set(first["tags"]) <= set(TAGS)
        assert app.run(["generate", str(run.folder), "--prompt", "ann rome", "--quiet"]) == 0
        assert capsys.readouterr().out == f"ann\t{first['tags'][0]}\nrome\t{first['tags'][1]}\n"
    elif case.task == "question-answering":
        assert first["answer"] in case.line["context"]
        assert app.run(["generate", str(run.folder), "--prompt", "who?", "--quiet"]) == 2
        assert "expected question and context, as a line of --file has them" in capsys.readouterr().err
    elif "numbers" in case.id:
        assert isinstance(first["label"], float)
    else:
        assert first["label"] == [name for name, score in first["scores"].items() if score > 0.5]


def test_a_head_whose_model_has_another_name_for_its_layers(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LlamaForQuestionAnswering takes none of a causal checkpoint's values: all of it would be random."""
    rows = write_rows(tmp_path / "rows.jsonl", *questions(4))
    train(tmp_path / "run", "--model", checkpoints["llama"], "--data", rows, *QUICK, code=2)
    assert "so the model would be random; transformers finds none of its layers" in capsys.readouterr().err


SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
OTHERS = {
    "roberta": SIZES | {"pad_token_id": 0},
    "modernbert": SIZES | {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "eos_token_id": 3},
    "distilbert": {"dim": 32, "n_heads": 2, "hidden_dim": 64, "n_layers": 2},
    "deberta-v2": SIZES | {"pad_token_id": 0},
    "electra": SIZES | {"embedding_size": 32},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "mistral": SIZES | {"num_key_value_heads": 1, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "pad_token_id": 0},
}


@pytest.mark.full
@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str, task: str, tmp_path: Path) -> None:
    tokenizer = wordpieces()
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), max_position_embeddings=80, **OTHERS[kind])
    saved = "seq2seq-lm" if kind == "t5" else "causal-lm" if kind in ("mistral", "gpt2") else "masked-lm"
    torch.manual_seed(0)
    auto_class(saved).from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", *(tagged() if task == "token-classification" else questions()))
    given = ["--data", rows, "--eval-fraction", "0.25", "--max-length", "64"]
    run = train(tmp_path / "run", "--model", str(tmp_path / "base"), *given, *QUICK)
    _, count, _, every = run.record["accelerated"].split()[:4]
    assert int(count) == int(every) > 0 and run.record["findings"]["metrics"]
    options = TOKENS.options if task == "token-classification" else {}
    base = auto_class(task).from_pretrained(tmp_path / "base", **options)
    plain = PeftModel.from_pretrained(base, run.folder)
    torch.testing.assert_close(outputs(plain), outputs(run.model), atol=1e-5, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(run.folder).padding_side == "right"
    assert app.run(["verify", str(run.folder), "--quiet"]) == 0


@pytest.mark.full
@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("token-classification", None),
        ("question-answering", None),
        ("sequence-classification", "multi_label_classification"),
        ("sequence-classification", "regression"),
    ],
)
def test_plan_knows_the_heads(task: str, problem: str | None, tmp_path: Path) -> None:
    labels = 1 if problem == "regression" else 3
    config = AutoConfig.for_model("bert", vocab_size=60, num_labels=labels, problem_type=problem, **SIZES)
    config.save_pretrained(tmp_path)
    given = ["--gpu-memory", "4GiB", "--seq", "32", "--method", "lora", "--no-largest", "--quiet"]
    assert app.run(["plan", str(tmp_path), *given, "--task", task]) == 0
