"""Translators of several languages (mBART, NLLB, M2M100): a token of each text says which language it is in."""

from __future__ import annotations

from typing import Any

from fastpeft.errors import UserError

KEYS = ("data.source_language", "data.target_language")


def has_languages(tokenizer: Any) -> bool:
    """Whether a tokenizer puts language codes to texts."""
    return hasattr(tokenizer, "set_src_lang_special_tokens") and hasattr(tokenizer, "tgt_lang")


def set_languages(tokenizer: Any, source: str | None, target: str | None, keys: tuple[str, str] = KEYS) -> None:
    """Have a tokenizer put these codes to prompts and completions; it keeps its own where one is None.

    Args:
        tokenizer: changed.
        source, target: codes such as "en_XX" (mBART) or "eng_Latn" (NLLB).
        keys: what the user calls them.

    Raises:
        UserError: the tokenizer has no languages, or not this one.
    """
    if not has_languages(tokenizer):
        for key, code in zip(keys, (source, target), strict=True):
            if code is not None:
                raise UserError(f"{key}: expected none for a tokenizer without language codes, got {code!r}")
        return
    for key, name, code in zip(keys, ("src_lang", "tgt_lang"), (source, target), strict=True):
        if code is None:
            continue
        try:
            setattr(tokenizer, name, code)
            known = _code(tokenizer, name) is not None
        except (KeyError, ValueError):
            known = False
        if not known:
            raise UserError(f"{key}: expected a language code of the tokenizer, got {code!r}")


def check_target(tokenizer: Any) -> None:
    """Raise UserError if completions would get the code of the prompts' language for want of their own."""
    if has_languages(tokenizer) and tokenizer.tgt_lang is None:
        raise UserError(
            f"{KEYS[1]}: expected the completions' language, as {tokenizer.src_lang!r} of prompts, got none"
        )


def begins_with(tokenizer: Any) -> dict[str, int]:
    """Options for transformers' `generate`, with which an answer is in the tokenizer's target language."""
    if not has_languages(tokenizer) or tokenizer.tgt_lang is None:
        return {}
    code = _code(tokenizer, "tgt_lang")
    if code is None:
        return {}
    # Where the code ends a text, as mBART's does, the model has learned to begin with it in the end token's place.
    comes_first = tokenizer(text_target="")["input_ids"][0] == code
    return {"forced_bos_token_id" if comes_first else "decoder_start_token_id": code}


def _code(tokenizer: Any, name: str) -> int | None:
    """The token id of a language; None where it is none of the tokenizer's."""
    empty = tokenizer(text_target="") if name == "tgt_lang" else tokenizer("")
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, None)
    found = [token for token in empty["input_ids"] if token not in others]
    return found[0] if len(found) == 1 else None
