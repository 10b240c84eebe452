"""New tokens for a domain's words, made of pieces that the tokenizer has."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from fastpeft.errors import UserError

LEAST = 5
"""How often pieces must come together to become one token."""
Pieces = tuple[str, ...]


def grow(tokenizer: Any, texts: Iterable[str], wanted: int | list[str]) -> dict[int, list[int]]:
    """Add tokens to a tokenizer, in place.

    Byte pair encodings go on as they were trained: the pair that comes most often within words becomes a token, and so
    on. WordPiece and Unigram get whole words, those that save most tokens. Decoding gives the same text as before.

    Args:
        tokenizer: transformers', of the fast kind.
        texts: of the domain; each is read once.
        wanted: how many tokens at most, or the words that are to be one token each.

    Returns:
        The new tokens' IDs, each with the IDs of the pieces that it stands for.

    Raises:
        UserError: a tokenizer of another kind, or nothing to add.
    """
    from tokenizers import Tokenizer

    inner = getattr(tokenizer, "backend_tokenizer", None)
    data: Any = json.loads(inner.to_str()) if inner is not None else {"model": {"type": type(tokenizer).__name__}}
    model = data["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram"):
        raise UserError(
            f"strategy.options.new_tokens: expected a tokenizer of BPE, WordPiece or Unigram, got {model['type']}"
        )
    words = _words(inner, texts if isinstance(wanted, int) else (f"a {word} a" for word in wanted))
    if not isinstance(wanted, int):
        words = Counter(dict.fromkeys(words, LEAST))
    limit = wanted if isinstance(wanted, int) else sum(map(len, words))
    found = _merges(model, words, limit) if model["type"] == "BPE" else _most_saving(model, words, limit)
    if not found:
        raise UserError(
            "strategy.options.new_tokens: expected words that the tokenizer splits and the texts have at least "
            f"{LEAST} times, got none"
        )
    old, first = tokenizer.get_vocab(), len(tokenizer)
    if model["type"] == "Unigram":
        if len(model["vocab"]) != first:
            raise UserError(
                "strategy.options.new_tokens: expected no tokens added behind the tokenizer's own, got some"
            )
        score = dict(map(tuple, model["vocab"]))
        model["vocab"] += [[token, min(score[piece] for piece in pieces)] for token, pieces in found.items()]
    else:
        model["vocab"] |= {token: first + number for number, token in enumerate(found)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    return {first + number: [old[piece] for piece in pieces] for number, pieces in enumerate(found.values())}


def _words(inner: Any, texts: Iterable[str]) -> Counter[Pieces]:
    """How often each word of letters comes that is more than one token, as these tokens."""
    found: Counter[Pieces] = Counter()
    for text in texts:
        encoding = inner.encode(text, add_special_tokens=False)
        found.update(word for word in _runs_of_letters(text, encoding.tokens, encoding.offsets) if len(word) > 1)
    return found


def _runs_of_letters(text: str, tokens: list[str], offsets: list[tuple[int, int]]) -> Iterator[Pieces]:
    """Only words that stand whole within tokens: pieces of bytes, or with other signs in them, end one."""
    word: list[str] = []
    ends = -1
    for token, (start, end) in zip(tokens, offsets, strict=True):
        piece = "" if token.startswith("<0x") else text[start:end]  # a byte of a sign that the tokenizer lacks
        if word and (start != ends or not piece.isalpha()):
            yield tuple(word)
            word = []
        begins = start == 0 or piece[:1].isspace() or not text[start - 1].isalpha()
        if piece == " " or (piece.strip().isalpha() and (word or begins)):
            word.append(token)
        ends = end
    if word:
        yield tuple(word)


def _joined(model: dict[str, Any], pieces: Pieces) -> str:
    mark = model.get("continuing_subword_prefix") or ""
    return pieces[0] + "".join(piece.removeprefix(mark) for piece in pieces[1:])


def _most_saving(model: dict[str, Any], words: Counter[Pieces], limit: int) -> dict[str, Pieces]:
    saved = {word: count * (len(word) - 1) for word, count in words.items() if count >= LEAST}
    ranked = sorted(saved, key=lambda word: (-saved[word], word))
    known = {entry[0] for entry in model["vocab"]} if isinstance(model["vocab"], list) else set(model["vocab"])
    unknown = {_joined(model, word): word for word in reversed(ranked) if _joined(model, word) not in known}
    return dict(list(reversed(unknown.items()))[:limit])


def _merges(model: dict[str, Any], words: Counter[Pieces], limit: int) -> dict[str, Pieces]:
    """The `limit` pairs that come most often, each counted with those before it merged; adds their merges too."""
    split: dict[int, list[str]] = {number: list(word) for number, word in enumerate(words)}
    counts = list(words.values())
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    barred: set[tuple[str, str]] = set()

    def count(number: int, sign: int) -> None:
        for pair in zip(split[number], split[number][1:], strict=False):
            if pair not in barred:
                pairs[pair] += sign * counts[number]
                places[pair].add(number)

    for number in split:
        count(number, 1)
    mark = model.get("continuing_subword_prefix") or ""
    strings = bool(model["merges"]) and isinstance(model["merges"][0], str)  # in files of older versions
    found: dict[str, Pieces] = {}
    while pairs and len(found) < limit:
        (left, right), often = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if often < LEAST:
            break
        token = left + right.removeprefix(mark)
        if token in model["vocab"] or token in found:  # reached in another way, which a new merge would get before
            del pairs[left, right]
            barred.add((left, right))
            continue
        found[token] = (*found.get(left, (left,)), *found.get(right, (right,)))
        model["merges"].append(f"{left} {right}" if strings else [left, right])
        for number in places.pop((left, right)):
            count(number, -1)
            split[number] = _with_merged(split[number], left, right, token)
            count(number, 1)
    return found


def _with_merged(pieces: list[str], left: str, right: str, token: str) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if piece == right and merged and merged[-1] == left:
            merged[-1] = token
        else:
            merged.append(piece)
    return merged
