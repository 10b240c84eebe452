"""The longest row of a model: with the length that `positions` gives it runs, with one token more it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fastpeft.models.bases import is_rotary, positions

POSITIONS = 34
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": POSITIONS,
}
PARTS = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
}
BART = {"vocab_size": 40, "d_model": 16, "max_position_embeddings": POSITIONS, **PARTS}
PROPHETNET = {
    **{"vocab_size": 40, "hidden_size": 16, "max_position_embeddings": POSITIONS},
    **{name if name.endswith("dim") else f"num_{name}": value for name, value in PARTS.items()},
}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Electra": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "XLMRobertaXL": SIZES,
    "RobertaPreLayerNorm": SIZES,
    "Camembert": SIZES,
    "MPNet": SIZES,
    "Data2VecText": SIZES,
    "Esm": {**SIZES, "pad_token_id": 1, "mask_token_id": 2},
    "Longformer": {**SIZES, "attention_window": [4]},
    "IBert": SIZES,
    "Luke": SIZES,
    "MarkupLM": SIZES,
    "Xmod": {**SIZES, "languages": ["en"], "default_language": "en"},
    "Bart": BART,
    "MBart": BART,
    "ProphetNet": PROPHETNET,
}


@pytest.mark.parametrize("name", MODELS)
def test_one_token_more_is_too_many(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = transformers.AutoModel.from_config(config).eval()
    longest = positions(config)
    assert longest is not None

    def run(length: int) -> None:
        ids = torch.randint(5, 39, (1, length))
        with torch.no_grad():
            model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))

    run(longest)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(longest + 1)


def test_models_without_a_limit() -> None:
    assert positions(transformers.T5Config()) is None
    assert positions(transformers.LlamaConfig(max_position_embeddings=100)) == 100


@pytest.mark.parametrize(
    ("name", "rotary"),
    [("Llama", True), ("GPTNeoX", True), ("ModernBert", True), ("Qwen2VL", True),
     ("GPT2", False), ("GPTJ", False), ("OPT", False), ("Bert", False), ("T5", False)],
)  # fmt: skip
def test_positions_that_are_angles(name: str, rotary: bool) -> None:
    """GPT-J's are a table of them."""
    assert is_rotary(getattr(transformers, f"{name}Config")()) is rotary
