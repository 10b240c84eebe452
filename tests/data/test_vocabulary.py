"""Vocabularies that grow: words become tokens, texts stay the same, and a saved tokenizer is the grown one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastpeft.data.vocabulary import grow
from fastpeft.errors import UserError
from tests.checkpoints import Checkpoints, characters, wordpieces

TEXTS = ["The bronchial artery; a bronchial biopsy.", "bronchial and (bronchial) arteries, biopsy: biopsy"] * 5
OTHERS = ["the sky is blue", "  two  spaces\nand a line", "Œuvre, 東京, 3.5 %", "abronchial"]


def unigram() -> PreTrainedTokenizerFast:
    signs = [chr(sign) for sign in range(33, 127)]
    inner = Tokenizer(
        models.Unigram(
            [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((sign, -4.0) for sign in signs)], 2
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = wordpieces()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = {"bpe": characters, "wordpiece": wordpiece, "unigram": unigram}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_words_take_fewer_tokens_and_decode_to_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [*TEXTS[:2], *OTHERS]
    before = [tokenizer.decode(ids_of(tokenizer, text)) for text in texts]
    lengths = [len(ids_of(tokenizer, text)) for text in texts]
    size = len(tokenizer)
    pieces = grow(tokenizer, TEXTS, 12)
    assert (
        2 <= len(pieces) <= 12
        and sorted(pieces) == list(range(size, size + len(pieces)))
        and len(tokenizer) == size + len(pieces)
    )
    assert [tokenizer.decode(ids_of(tokenizer, text)) for text in texts] == before
    after = [len(ids_of(tokenizer, text)) for text in texts]
    assert sum(after[:2]) < sum(lengths[:2]) - 20 and all(now <= then for now, then in zip(after, lengths, strict=True))


def test_a_new_token_stands_for_its_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    for token, pieces in grow(tokenizer, TEXTS, 12).items():
        first, *others = tokenizer.convert_ids_to_tokens(pieces)
        assert others and max(pieces) < token
        assert tokenizer.convert_ids_to_tokens(token) == first + "".join(other.removeprefix("##") for other in others)


def test_a_saved_one_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    grow(tokenizer, TEXTS, 12)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:2], *OTHERS]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_shipped_models_tokenizer(checkpoints: Checkpoints, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    sample = OTHERS[:3]
    before = [ids_of(tokenizer, text) for text in sample]
    grow(tokenizer, TEXTS, 5)
    assert [ids_of(tokenizer, text) for text in sample] == before
    assert all(tokenizer.decode(ids_of(tokenizer, text)) == text for text in (*TEXTS[:2], *sample))


def test_words_of_a_file_become_one_token_each(tokenizer: PreTrainedTokenizerFast) -> None:
    grow(tokenizer, [], ["bronchial", "artery"])
    assert len(ids_of(tokenizer, "a bronchial artery")) == len(ids_of(tokenizer, "a")) + 2


def test_what_comes_most_often_is_taken_first() -> None:
    tokenizer = characters()
    [pieces] = grow(tokenizer, ["zxzx q zxzx zxzx zxzx qv qv qv qv qv"], 1).values()
    assert tokenizer.decode(pieces) == "zx"


def test_rare_words_are_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="new_tokens: expected words that the tokenizer splits"):
        grow(tokenizer, ["bronchial artery"] * 4, 5)


def test_another_kind_of_tokenizer() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"))
    with pytest.raises(UserError, match="expected a tokenizer of BPE, WordPiece or Unigram, got WordLevel"):
        grow(PreTrainedTokenizerFast(tokenizer_object=inner), TEXTS, 5)


def test_unigram_with_tokens_added_behind() -> None:
    tokenizer = unigram()
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(UserError, match="expected no tokens added behind the tokenizer's own"):
        grow(tokenizer, TEXTS, 5)
