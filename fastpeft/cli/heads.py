"""`fastpeft generate` with a model that has a head of its own: classes, numbers, tags, parts of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastpeft.errors import UserError

if TYPE_CHECKING:
    from fastpeft.generation import Prompt
    from fastpeft.models.tuned import Source


def checked(prompt: Prompt, task: str) -> Prompt:
    """The prompt in the form of its task; a text for a tagger is taken apart at spaces.

    Raises:
        UserError: it has another form.
    """
    given = prompt.given
    if task == "token-classification":
        words = given.split() if isinstance(given, str) else given
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{prompt.where}: expected words or a text for a tagger, got messages")
        return replace(prompt, given=words)
    if not isinstance(given, str):
        raise UserError(f"{prompt.where}: expected a text for a classifier, got messages")
    if task == "question-answering" and not (prompt.pair or "").strip():
        raise UserError(f"{prompt.where}: expected question and context, as a line of --file has them, got no context")
    return prompt


def predictions(
    source: Source, model: Any, tokenizer: Any, prompts: list[Prompt], batch_size: int
) -> Iterator[dict[str, Any]]:
    """What the model makes of each prompt, with the prompt."""
    from fastpeft.prediction import answer, classify, tag

    length, given = source.max_length, [prompt.given for prompt in prompts]
    if source.task in ("token-classification", "question-answering"):
        tokenizer.padding_side = "right"
    if source.task == "token-classification":
        for words, tags in zip(given, tag(model, tokenizer, given, batch_size, length), strict=True):
            yield {"tokens": words, "tags": tags}
        return
    pairs = [prompt.pair for prompt in prompts]
    if source.task == "question-answering":
        asked = [(question, context or "") for question, context in zip(given, pairs, strict=True)]
        answers = answer(model, tokenizer, asked, batch_size, length, [prompt.where for prompt in prompts])
        for (question, context), text in zip(asked, answers, strict=True):
            yield {"question": question, "context": context, "answer": text}
        return
    for prompt, scores in zip(prompts, classify(model, tokenizer, given, pairs, batch_size, length), strict=True):
        pair = {} if prompt.pair is None else {"text_pair": prompt.pair}
        yield {"text": prompt.given, **pair, **_labelled(scores, source.problem_type)}


def _labelled(scores: list[tuple[str, float]], problem: str | None) -> dict[str, Any]:
    from fastpeft.metrics.multilabel import THRESHOLD

    if problem == "regression":
        return {"label": scores[0][1]}
    several = [name for name, probability in scores if probability > THRESHOLD]
    return {"label": several if problem == "multi_label_classification" else scores[0][0], "scores": dict(scores)}


def plain(found: dict[str, Any]) -> str:
    """One prediction as text, without its prompt."""
    if "answer" in found:
        return str(found["answer"])
    if "tags" in found:
        return "\n".join(f"{word}\t{tag or ''}" for word, tag in zip(found["tokens"], found["tags"], strict=True))
    if "scores" in found:
        return "\n".join(f"{name}\t{probability:.4f}" for name, probability in found["scores"].items())
    return f"{found['label']:.6g}"
