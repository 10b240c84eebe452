"""Models, adapters and tokenizers that mean harm: refused in one line, and nothing of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from tests.checkpoints import write_rows
from tests.commands import Answer, run

from . import hostile

BOMB = "(([a-z_.0-9])*)*!"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.lora(tmp_path_factory.mktemp("adapters") / "good")


def generate(capsys: pytest.CaptureFixture[str], folder: Path) -> Answer:
    return run(capsys, "generate", str(folder), "--prompt", "hi", "--max-new-tokens", "2", "--quiet")


def refused(answer: Answer, words: str) -> None:
    """In one line, with exit code 2."""
    assert (answer.code, answer.err.count("\n")) == (2, 1) and words in answer.err, answer


def test_a_good_adapter_is_loaded(capsys: pytest.CaptureFixture[str], good: Path) -> None:
    answer = generate(capsys, good)
    assert (answer.code, answer.err) == (0, "")


@pytest.mark.parametrize("command", ["plan", pytest.param("generate", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of its config.json: expected at most 1024, got 1000000000"),
        ({"hidden_size": 2**40}, "hidden_size of its config.json: expected at most 16777216, got 1e+12"),
        ({"vocab_size": 10**18}, "vocab_size of its config.json: expected at most 16777216, got 1e+18"),
        ({"text_config": {"n_routed_experts": 10**6}}, "text_config.n_routed_experts of its config.json: expected"),
        ({"num_hidden_groups": 10**8}, "num_hidden_groups of its config.json: expected at most 16384, got 100000000"),
        ({"hidden_size": 10**400}, "hidden_size of its config.json: expected at most 16777216, got one of 1329 bits"),
        ({"depths": [2, 10**8]}, "depths of its config.json: expected at most 1024, got 100000000"),
        ({"num_attention_heads": 0}, "could not be loaded"),
        ({"hidden_size": -256}, "MODEL: "),
        ({"attn_implementation": "some/kernel"}, "'some/kernel' is code from the hub, which runs only with trust_rem"),
        ({"_attn_implementation": {"": "some/kernel"}}, "'some/kernel' is code from the hub"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "contains custom code"),
    ],
)
def test_configurations(
    command: str, values: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hostile.model(tmp_path / "model", **values)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    options = ("--gpu-memory", "24GiB", "--seq", "64") if command == "plan" else ("--prompt", "hi", "--quiet")
    refused(run(capsys, command, str(folder), *options), words)
    assert not (tmp_path / "mark").exists()


def test_code_of_a_known_kind_of_model_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile.model(tmp_path / "model", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    assert generate(capsys, folder).code == 0 and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_brackets_without_end(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile.model(tmp_path / "model")
    (folder / name).write_text("[" * 200_000)
    refused(generate(capsys, folder), "")


def test_pickles_are_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path) -> None:
    """Not even good ones, which are as easily changed as read."""
    folder = hostile.model(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(generate(capsys, folder), "it has no weights in safetensors; other files are pickles, which are never read")
    adapter = hostile.adapter(tmp_path / "adapter", good)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"evil": hostile.Payload(tmp_path / "mark")}, adapter / "adapter_model.bin")
    refused(generate(capsys, adapter), "expected adapter_model.safetensors in")
    assert not (tmp_path / "mark").exists()


def test_a_header_that_promises_more_than_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path
) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    broken = len(header).to_bytes(8, "little") + header + b"few"
    folder = hostile.model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(broken)
    refused(generate(capsys, folder), "could not be loaded")
    adapter = hostile.adapter(tmp_path / "adapter", good)
    (adapter / "adapter_model.safetensors").write_bytes(broken)
    refused(generate(capsys, adapter), "adapter_model.safetensors cannot be read")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 10**6}, "r: expected a rank that its weights have, got 1000000"),
        ({"r": "4"}, "r: expected a whole number, got '4'"),
        ({"rank_pattern": {"q_proj": 10**6}}, "q_proj: expected a rank that its weights have, got 1000000"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "num_virtual_tokens: expected a rank"),
        ({"init_lora_weights": "pissa_niter_100000000"}, "expected at most 64 iterations, got 100000000"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}}, "expected at most 64 iterations"),
        ({"layer_replication": [[0, 4]] * 1000}, "layer_replication: expected at most 1024 layers, got more"),
        ({"target_modules": BOMB}, "target_modules: expected names or a plain pattern, got one that could match for"),
        ({"rank_pattern": {BOMB: 4}}, "rank_pattern: expected names or a plain pattern"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_core"),
        ({"peft_type": "XLORA", "adapters": {"0": "some/adapter"}}, "X-LoRA is made of other adapters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters(
    values: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path
) -> None:
    refused(generate(capsys, hostile.adapter(tmp_path / "adapter", good, **values)), words)


def test_an_adapter_larger_than_its_base(tmp_path: Path, good: Path) -> None:
    """Told from the header: the values are not read."""
    from peft import PeftConfig

    from fastpeft.errors import UserError
    from fastpeft.models.untrusted import FEW, check_adapter_weights

    folder = hostile.adapter(tmp_path / "adapter", good)
    save_file({"a": torch.zeros(FEW + 17, dtype=torch.uint8)}, folder / "adapter_model.safetensors")
    base = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(UserError, match=f"expected an adapter of at most {FEW + 16} values"):
        check_adapter_weights(folder, PeftConfig.from_pretrained(str(folder)), base, "MODEL")


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.\d+\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj))",
        r"(?:.*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.q_proj)",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r".*\.(q|v)_proj",
        r"layers\.[(*+)]\(x*\)",
    ],
)
def test_patterns_that_people_use_are_taken(pattern: str) -> None:
    from peft import LoraConfig

    from fastpeft.models.untrusted import check_adapter_config

    check_adapter_config(LoraConfig(target_modules=pattern), "MODEL")


@pytest.mark.parametrize("pattern", [BOMB, "(a+)+$", "(?:(a|b*)c)*", "((x{2,}))*", "x" * 3000])
def test_patterns_without_end_are_not(pattern: str) -> None:
    from peft import LoraConfig

    from fastpeft.errors import UserError
    from fastpeft.models.untrusted import check_adapter_config

    with pytest.raises(UserError, match="target_modules: expected names or a plain pattern"):
        check_adapter_config(LoraConfig(target_modules=pattern), "MODEL")


@pytest.mark.parametrize(("beams", "said"), [(10**6, "1000000"), (10**400, "one of 1329 bits"), ("many", "'many'")])
def test_more_beams_than_memory(beams: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile.model(tmp_path / "model")
    hostile.changed(folder / "generation_config.json", num_beams=beams)
    refused(generate(capsys, folder), f"num_beams of its generation_config.json: expected at most 256, got {said}")


def test_a_base_with_an_adapter_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path) -> None:
    """transformers would load it too, unseen, whatever is in its configuration."""
    folder = hostile.model(tmp_path / "model")
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    hostile.changed(folder / "adapter_config.json", r=10**9)
    rows = write_rows(tmp_path / "rows.jsonl", {"text": "some words"})
    answer = run(capsys, "train", "--model", str(folder), "--data", rows, "--output-dir", str(tmp_path / "run"))
    refused(answer, "model.name: expected a base model alone, got one with an adapter beside it")
    with pytest.raises(ValueError, match="name_or_path: expected a base model alone, got one with an adapter"):
        fastpeft.load(folder, quantization="none")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of its config.json: expected at most 1024"),
        ({"attn_implementation": "some/kernel"}, "'some/kernel' is code from the hub"),
    ],
)
def test_the_library_s_own_way_to_load(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"name_or_path: .*{words}"):
        fastpeft.load(hostile.model(tmp_path / "model", **values), quantization="none")


def test_an_index_with_brackets_without_end(tmp_path: Path) -> None:
    folder = hostile.model(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="expected an index with a weight_map of names, got another file"):
        fastpeft.load(folder, quantization="none")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}, "expected u32"),
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "charsmap"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "model_max_length of its tokenizer: expected a num"),
    ],
)
def test_tokenizers(
    name: str, values: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library in Rust has errors of no kind, and some that are no `Exception`."""
    folder = hostile.model(tmp_path / "model")
    hostile.changed(folder / name, **values)
    refused(generate(capsys, folder), words)


def test_a_rank_that_no_base_has(tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path) -> None:
    """One tensor of so many values is small, and modules of such a rank are not."""
    folder = hostile.adapter(tmp_path / "adapter", good, r=10**6)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({**weights, "more": torch.zeros(10**6, dtype=torch.uint8)}, folder / "adapter_model.safetensors")
    refused(generate(capsys, folder), "r: expected a rank that its weights have, got 1000000")


def test_no_text_is_a_command_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile.model(tmp_path / "model", **{"a\x1b]52;c;x\x07\u202e_layers": 10**9})
    answer = generate(capsys, folder)
    refused(answer, "a]52;c;x_layers of its config.json: expected at most 1024")
    assert answer.err.removesuffix("\n").isprintable()


def test_a_chat_template_has_no_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' sandbox; the attempt is refused in its words."""
    folder = hostile.model(tmp_path / "model")
    mark = tmp_path / "mark"
    code = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    (folder / "chat_template.jinja").write_text(code)
    refused(generate(capsys, folder), "the chat template")
    assert not mark.exists()


def test_code_from_the_hub_that_was_asked_for() -> None:
    from fastpeft.models.untrusted import check_config

    check_config({"attn_implementation": "some/kernel"}, "MODEL", trusted=True)
    check_config({"attn_implementation": "sdpa"}, "MODEL", trusted=False)
