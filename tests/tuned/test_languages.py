"""Translators whose tokenizers put a language code to each text, before it (NLLB) or after it (mBART)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.cli import app
from fastpeft.data.languages import begins_with, check_target, set_languages
from fastpeft.errors import UserError
from fastpeft.models import tuned

from .conftest import train, write_rows

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁sky", "▁ciel", "a", "b"]
CODES = {"nllb": ("eng_Latn", "fra_Latn"), "mbart": ("en_XX", "fr_XX")}


def tokenizer_of(kind: str) -> Any:
    from transformers import MBartTokenizer, NllbTokenizer

    if kind == "nllb":
        return NllbTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[])
    return MBartTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(PIECES)])


@pytest.mark.parametrize("kind", CODES)
def test_codes_of_both_sides(kind: str) -> None:
    tokenizer, (source, target) = tokenizer_of(kind), CODES[kind]
    with pytest.raises(UserError, match=r"^data.target_language: expected the completions' language, as '"):
        check_target(tokenizer)
    assert begins_with(tokenizer) == {}
    set_languages(tokenizer, source, target)
    check_target(tokenizer)
    code = tokenizer.convert_tokens_to_ids(target)
    assert code in tokenizer(text_target="sky")["input_ids"] and code not in tokenizer("sky")["input_ids"]
    assert begins_with(tokenizer) == {"forced_bos_token_id" if kind == "nllb" else "decoder_start_token_id": code}
    set_languages(tokenizer, None, source)
    assert list(begins_with(tokenizer).values()) == [tokenizer.convert_tokens_to_ids(source)]
    for key, codes in (("source", ("xx", None)), ("target", (None, "xx"))):
        with pytest.raises(
            UserError, match=f"data.{key}_language: expected a language code of the tokenizer, got 'xx'"
        ):
            set_languages(tokenizer_of(kind), *codes)


def test_m2m100_names_languages_otherwise_than_their_tokens() -> None:
    class Tokenizer:
        """As M2M100's: `en` is the token `__en__`."""

        eos_token_id, bos_token_id, unk_token_id = 2, 0, 3
        ids, src_lang, tgt_lang = {"en": 7, "fr": 8}, "en", None

        def __setattr__(self, name: str, value: str) -> None:
            self.__dict__[name] = [value, self.ids[value]][0]

        def set_src_lang_special_tokens(self, language: str) -> None: ...

        def __call__(self, text: str = "", text_target: str | None = None) -> dict[str, list[int]]:
            return {"input_ids": [self.ids[self.src_lang if text_target is None else self.tgt_lang], 2]}

    tokenizer = Tokenizer()
    with pytest.raises(UserError, match="got 'xx'"):
        set_languages(tokenizer, "xx", None)
    set_languages(tokenizer, "en", "fr")
    assert begins_with(tokenizer) == {"forced_bos_token_id": 8}


def test_others_have_none() -> None:
    with pytest.raises(UserError, match="--source-language: expected none for a tokenizer without language codes"):
        set_languages(object(), "en_XX", None, ("--source-language", "--target-language"))
    set_languages(object(), None, None)
    check_target(object())
    assert begins_with(object()) == {}


@pytest.mark.parametrize("kind", [pytest.param("nllb", marks=pytest.mark.full), "mbart"])
def test_trained_and_asked(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels have the target's code, and answers begin with it, without being told again."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration, MBartConfig, MBartForConditionalGeneration

    tokenizer, (source, target) = tokenizer_of(kind), CODES[kind]
    tokenizer.save_pretrained(tmp_path / "model")
    config, model = (
        (M2M100Config, M2M100ForConditionalGeneration)
        if kind == "nllb"
        else (MBartConfig, MBartForConditionalGeneration)
    )
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model(config(vocab_size=len(tokenizer), **sizes, **widths)).save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "sky", "completion": "ciel"}] * 8)
    base = ("--model", tmp_path / "model", "--data", rows, "--max-steps", 1)
    codes = ("--data.source_language", source, "--data.target_language", target)
    run = train(tmp_path / "run", *base, *codes)

    begun: list[list[int]] = []

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        begun.append(generate(self, *args, **options))
        return begun[-1]

    generate = model.generate
    monkeypatch.setattr(model, "generate", watched)
    for more, code in (((), target), (("--target-language", source), source)):
        asked = ["generate", str(run), "-p", "sky", "--max-new-tokens", "4", "--quiet", *more]
        assert app.run(asked) == 0
        assert begun[-1][0].tolist().index(tokenizer.convert_tokens_to_ids(code)) == (kind == "nllb")
    loaded = tuned.load_tokenizer(tuned.find(str(run)))
    assert (loaded.src_lang, loaded.tgt_lang) == (source, target)
