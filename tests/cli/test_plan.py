"""`fastpeft plan` as a new user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.checkpoints import Checkpoints
from tests.commands import run

SMALL = ("--seq", "32", "--rank", "4", "--method", "lora", "--no-largest")


def test_it_fits_or_not(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", checkpoints["llama"], *SMALL, "--gpu-memory", "8GiB", "--gpu-memory", "64MiB", "--json"]
    answer = run(capsys, *words)
    found = json.loads(answer.out)["plans"]
    assert answer.code == 1 and [each["fits"] for each in found] == [True, False]
    assert found[1]["changes"] and answer.err == ""


def test_a_table_says_what_is_beyond_the_last_position(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((Path(checkpoints["llama"]) / "config.json").read_text())
    last = config["max_position_embeddings"]
    words = [
        "plan",
        checkpoints["llama"],
        *SMALL,
        "--gpu-memory",
        "8GiB",
        "--gpu-memory",
        "16GiB",
        "--seq",
        f"{last + 1}",
    ]
    answer = run(capsys, *words)
    assert answer.code == 0 and answer.out.endswith(
        f"note: beyond the model's last position, {last}: extend its rope first\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere/such-model", "--gpu-memory", "8GiB"], "MODEL: "),
        (["llama-3.1-8b", "--gpu-memory", "8G"], "--gpu-memory: expected a size such as 24GiB or 24GB, got '8G'"),
        (["llama-3.1-8b", "--gpu-memory", "8GiB", "--host-memory", "x"], "--host-memory: expected a size"),
        (["llama-3.1-8b", "--gpu-memory", "8GiB", "--optimizer", "adam"], "optimizer: expected one of"),
    ],
)
def test_wrong_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "plan", *words, *SMALL)
    assert answer.code == 2 and said in answer.err and answer.err.count("\n") == 1 and not answer.out


def test_weights_that_the_host_has_no_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They wait on the disk; it fits where it would not, and the exit code says so."""
    sizes = {"vocab_size": 128, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    written = LlamaConfig(**sizes, num_attention_heads=2, architectures=["LlamaForCausalLM"])
    written.save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--seq", "32", "--rank", "4", "--gpu-memory", "575MiB", "--no-largest", "--json"]
    enough = json.loads(run(capsys, *words).out)["plans"][0]
    assert enough["bytes"]["host"] > 4096 and "disk" not in enough["bytes"]
    answer = run(capsys, *words, "--host-memory", "4KiB", "--disk-bandwidth", "500MB")
    found = json.loads(answer.out)["plans"][0]
    assert answer.code == 0 and found["bytes"]["host"] == found["weights_in_host_memory"] == 4096
    assert found["bytes"]["disk"] + 4096 == enough["bytes"]["host"] and found["rates"]["disk"] == 500e6
    assert found["read_hidden_from"] > found["hidden_from"] and found["slowdown"] > enough["slowdown"]
    wrong = run(capsys, *words, "--disk-bandwidth", "fast")
    assert wrong.code == 2 and "--disk-bandwidth: expected a size" in wrong.err
