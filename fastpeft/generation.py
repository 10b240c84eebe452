"""Text from a fine-tuned model, or a classifier's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fastpeft.data.chat import messages_of
from fastpeft.errors import UserError

PLAIN = (".txt", ".md")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token each time.
        top_p, top_k: sample among the likeliest that make up top_p, and among top_k; 1 and 0 for all.
        repetition_penalty: above 1 discourages words that were there already.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def options(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return found | {"repetition_penalty": self.repetition_penalty}


def read_prompts(path: Path, key: str = "--file") -> list[Any]:
    """Prompts from a file: a line each of text, or `messages`, `prompt` or `text` of each JSON line.

    Raises:
        UserError: no such file, no JSON, or none of these keys.
    """
    if not path.is_file():
        raise UserError(f"{key}: expected a file, got {path}, which is not there")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{key}: expected text in UTF-8, got something else in {path}") from None
    if not lines:
        raise UserError(f"{key}: expected at least one prompt, got none in {path}")
    if path.suffix.lower() in PLAIN:
        return lines
    return [_prompt(line, f"{key}: {path}, line {number}") for number, line in enumerate(lines, 1)]


def _prompt(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg}") from error
    for name in ("messages", "prompt", "text"):
        if isinstance(row, dict) and row.get(name):
            return row[name]
    raise UserError(f"{where}: expected messages, prompt or text, got {line[:60]}")


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends an answer: the model's own tokens, and the tokenizer's, which a run may have chosen anew."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({token for token in (*found, tokenizer.eos_token_id) if token is not None})


class Generator:
    """Prompts to text.

    Args:
        model, tokenizer: from models.tuned.
        system: message before each prompt, for chats.
        raw: the prompt as it is, without the chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, *, system: str | None = None, raw: bool = False) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.chats = bool(tokenizer.chat_template) and not raw
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.system = system
        if system is not None and not self.chats:
            raise UserError("--system: expected chats, so a model with a chat template and no --raw, got none")
        tokenizer.padding_side = "right" if self.encoder_decoder else "left"

    def encode(self, prompts: Sequence[Any]) -> Any:
        """input_ids and attention_mask, (prompts, tokens) each, on the model's device."""
        if self.chats:
            texts = [self._templated(prompt) for prompt in prompts]
        elif any(not isinstance(prompt, str) for prompt in prompts):
            raise UserError("--file: expected prompts as text, because the model has no chat template, got messages")
        else:
            texts = list(prompts)
        special = not self.chats
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special)
        found = {name: batch[name] for name in ("input_ids", "attention_mask")}
        eos = self.tokenizer.eos_token_id
        if special and not self.encoder_decoder and eos is not None and bool((found["input_ids"][:, -1] == eos).all()):
            found = {name: tensor[:, :-1] for name, tensor in found.items()}  # the text goes on
        return {name: tensor.to(self.model.device) for name, tensor in found.items()}

    def _templated(self, prompt: Any) -> str:
        messages = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            messages = messages_of({"messages": prompt}, "--file")
            if messages[-1]["role"] == "assistant":
                raise UserError("--file: expected messages that end before the answer, got a last one of the assistant")
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"--prompt: the chat template refuses the roles {roles}: {error}") from error
        return text

    def stream(self, prompt: Any, sampling: Sampling, to: TextIO) -> None:
        """One answer, written as it comes."""
        from transformers import TextStreamer

        if (getattr(self.model.generation_config, "num_beams", 1) or 1) > 1:  # nothing is certain before the end
            to.write(f"{self._generate([prompt], sampling)[0]}\n")
            return

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                to.write(text)
                to.flush()

        self._generate(
            [prompt], sampling, Streamer(self.tokenizer, skip_prompt=not self.encoder_decoder, skip_special_tokens=True)
        )
        to.write("\n")

    def answers(self, prompts: Sequence[Any], sampling: Sampling, batch_size: int) -> Iterator[str]:
        """One answer a prompt, in their order."""
        for start in range(0, len(prompts), batch_size):
            yield from self._generate(prompts[start : start + batch_size], sampling)

    def _generate(self, prompts: Sequence[Any], sampling: Sampling, streamer: Any = None) -> list[str]:
        batch = self.encode(prompts)
        ids = self.model.generate(
            **batch,
            **sampling.options(),
            streamer=streamer,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.tokenizer),
        )
        start = 0 if self.encoder_decoder else batch["input_ids"].shape[1]
        texts: list[str] = self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts]


def classify(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int,
    *,
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> Iterator[list[tuple[str, float]]]:
    """Each text's classes with their probabilities, the likeliest first.

    Args:
        pairs: second texts, where the model was trained on two.
        max_length: in tokens; what is longer is cut, as in training. The tokenizer's own limit when None.
    """
    import torch

    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        second = None if pairs is None else list(pairs[part])
        batch = tokenizer(
            list(texts[part]), second, return_tensors="pt", padding=True, truncation=True, max_length=max_length
        )
        with torch.no_grad():
            scores = model(**batch.to(model.device)).logits.float().softmax(dim=-1)
        for row in scores:
            order = row.argsort(descending=True).tolist()
            yield [(model.config.id2label[number], row[number].item()) for number in order]
