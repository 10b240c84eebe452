from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.config import FastpeftConfig

EXAMPLE = """
model: {name: some/model, quantization: nf4}
lora:
  r: 8
  alpha: 16
  target_modules: [q_proj, v_proj]
training:
  learning_rate: 1e-4
  extra: {report_to: tensorboard}
memory: {budget_gib: 16}
strategy:
  name: distillation
  options: {teacher: some/teacher, temperature: 2.0}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_fills_the_sections(tmp_path: Path) -> None:
    config = FastpeftConfig.from_yaml(write(tmp_path, EXAMPLE))
    assert (config.model.quantization, config.model.double_quant) == ("nf4", True)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.lora.alpha == 16.0 and isinstance(config.lora.alpha, float)
    assert config.training.learning_rate == 1e-4
    assert config.training.extra == {"report_to": "tensorboard"}
    assert config.memory.budget_gib == 16.0
    assert config.strategy.options["temperature"] == 2.0
    assert config.acceleration.enabled


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert FastpeftConfig.from_yaml(write(tmp_path, "")) == FastpeftConfig()


def test_it_comes_back_from_a_dictionary_and_from_yaml(tmp_path: Path) -> None:
    config = FastpeftConfig.from_yaml(write(tmp_path, EXAMPLE))
    assert FastpeftConfig.from_dict(config.to_dict()) == config
    assert FastpeftConfig.from_yaml(write(tmp_path, config.to_yaml())) == config


@given(st.integers(1, 512), st.floats(1e-9, 1.0), st.sampled_from(["all-linear", ["q_proj"]]))
def test_any_values_come_back(r: int, learning_rate: float, targets: object) -> None:
    data = {"lora": {"r": r, "target_modules": targets}, "training": {"learning_rate": learning_rate}}
    config = FastpeftConfig.from_dict(data)
    assert FastpeftConfig().override([f"lora.r={r}", f"lora.target_modules={targets}"]).lora == config.lora
    assert FastpeftConfig.from_dict(config.to_dict()) == config


def test_overrides_change_a_copy() -> None:
    config = FastpeftConfig()
    settings = ["lora.r=8", "model.name=a/b", "training.learning_rate=5e-5", "memory.budget_gib=null"]
    changed = config.override([*settings, "lora.target_modules=[q, v]"])
    assert (changed.lora.r, changed.model.name, changed.training.learning_rate) == (8, "a/b", 5e-5)
    assert changed.lora.target_modules == ["q", "v"] and changed.memory.budget_gib is None
    assert config == FastpeftConfig()


def test_a_model_and_data_may_be_one_word(tmp_path: Path) -> None:
    config = FastpeftConfig.from_yaml(write(tmp_path, "model: some/model\ndata: chats.jsonl"))
    assert (config.model.name, config.data.path) == ("some/model", "chats.jsonl")


def test_overrides_reach_into_free_options() -> None:
    assert FastpeftConfig().override(["strategy.options.temperature=2"]).strategy.options == {"temperature": 2}


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("lora.r=eight", TypeError, r"lora\.r: expected int, got 'eight' \(str\)"),
        ("lora.r=true", TypeError, r"lora\.r: expected int, got True \(bool\)"),
        ("lora.r=8.0", TypeError, r"lora\.r: expected int, got 8\.0 \(float\)"),
        ("lora.rr=8", ValueError, r"lora\.rr: unknown key, did you mean 'lora\.r'\?"),
        ("lra.r=8", ValueError, r"lra: unknown key, did you mean 'lora'\?"),
        ("zzz=8", ValueError, r"zzz: unknown key, expected one of method, model, data, lora"),
        ("lora.r.x=8", ValueError, r"lora\.r\.x: lora\.r has no keys of its own"),
        ("lora.r", ValueError, r"override: expected section\.key=value, got 'lora\.r'"),
        ("=8", ValueError, r"override: expected section\.key=value, got '=8'"),
        ("lora=8", TypeError, r"lora: expected a mapping, got 8 \(int\)"),
        ("lora.target_modules=3", TypeError, r"lora\.target_modules: expected str or list\[str\], got 3 \(int\)"),
        ("lora.target_modules=[q, 1]", TypeError, r"expected str or list\[str\], got \['q', 1\]"),
        ("lora.modules_to_save=[q, 1]", TypeError, r"lora\.modules_to_save\[1\]: expected str, got 1 \(int\)"),
        (
            "model.quantization=nf5",
            ValueError,
            r"quantization: expected one of 'none', .* got 'nf5', did you mean 'nf4'\?",
        ),
        ("model.double_quant=1", TypeError, r"model\.double_quant: expected bool, got 1 \(int\)"),
        ("memory.budget_gib=big", TypeError, r"memory\.budget_gib: expected float or null, got 'big' \(str\)"),
        ("lora.r=[1", ValueError, r"lora\.r: not valid YAML"),
        ("method=qloar", ValueError, r"method: expected one of 'lora', 'qlora', got 'qloar', did you mean 'qlora'\?"),
    ],
)
def test_errors_name_key_expected_and_got(setting: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FastpeftConfig().override([setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {r: 8, r: 16}", "run.yaml: not valid YAML: .*the key 'r' comes twice"),
        ("lora: [", "run.yaml: not valid YAML"),
        ("lora: {q: 1}", "lora.q: unknown key"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastpeftConfig.from_yaml(write(tmp_path, text))


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"top level: expected a mapping, got \['lora'\] \(list\)"):
        FastpeftConfig.from_yaml(write(tmp_path, "- lora"))


def test_configurations_are_immutable() -> None:
    with pytest.raises(AttributeError):
        FastpeftConfig().lora.r = 3  # type: ignore[misc]
