"""Prompts, and text from a fine-tuned model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from fastpeft.data.chat import messages_of, short, variables_of
from fastpeft.data.languages import begins_with
from fastpeft.errors import UserError
from fastpeft.models.bases import positions

PLAIN = (".txt", ".md")
GIVEN = ("messages", "prompt", "text", "tokens", "question")
"""Keys of a JSON line that hold what is to be answered."""


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


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        given: text, messages, or words for a tagger.
        where: how to call it in messages to the user.
        pair: a second text, for classifiers of pairs; the context of a question.
        variables: of the chat template, such as `tools`.
    """

    given: Any
    where: str = "--prompt"
    pair: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UserError for halves of characters, which bytes that are no UTF-8 become, and which have no tokens."""
        try:
            json.dumps([self.given, self.pair], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{self.where}: expected text in UTF-8, got something else") from None


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file: a line each of text, or one of GIVEN of each JSON line.

    Raises:
        UserError: no such file, no JSON, or none of these keys.
    """
    if path.is_dir():
        raise UserError(f"--file: expected a file, got a folder: {path}")
    if not path.exists():
        raise UserError(f"--file: expected a file, got {path}, which is not there")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would end a line at U+2028, too
    except UnicodeDecodeError:
        raise UserError(f"--file: expected text in UTF-8, got something else in {path}") from None
    numbered = [(line, f"--file: {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--file: expected at least one prompt, got none in {path}")
    if path.suffix.lower() in PLAIN:
        return [Prompt(line, where) for line, where in numbered]
    return [_prompt(line, where) for line, where in numbered]


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # more digits, or more brackets, than Python reads
        raise UserError(f"{where}: not valid JSON: {error}") from error
    row = row if isinstance(row, dict) else {}
    given = next((row[name] for name in GIVEN if row.get(name)), None)
    if not isinstance(given, (str, list)):
        raise UserError(f"{where}: expected messages, prompt, text, tokens or question, got {line[:60]}")
    second = "context" if "question" in row else "text_pair"
    pair = row.get(second)
    if not isinstance(pair, (str, type(None))):
        raise UserError(f"{where}: expected {second} as text, got {short(pair)}")
    return Prompt(given, where, pair, variables_of(row, where))


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends an answer: the model's own tokens, and the tokenizer's, which a run may have chosen anew."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({token for token in (*found, tokenizer.eos_token_id) if token is not None})


class PromptEncoder:
    """Prompts to token ids, before a model is loaded.

    Args:
        tokenizer: from models.tuned.
        config: transformers', of the model.
        system: message before each prompt, for chats.
        raw: the prompt as it is, without the chat template.

    Raises:
        UserError: a system message without chats.
    """

    def __init__(self, tokenizer: Any, config: Any, *, system: str | None = None, raw: bool = False) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.chats = bool(tokenizer.chat_template) and not raw
        self.encoder_decoder = bool(config.is_encoder_decoder)
        self.longest = positions(config)
        if system is not None and not self.chats:
            raise UserError("--system: expected chats, so a model with a chat template and no --raw, got none")

    def __call__(self, prompt: Prompt) -> list[int]:
        """Token ids. Raises UserError for a prompt that is none, or leaves the model no position for an answer."""
        if not self.chats and not isinstance(prompt.given, str):
            where = prompt.where
            raise UserError(f"{where}: expected text, because the model has no chat template, got messages")
        text = self._templated(prompt) if self.chats else prompt.given
        ids = list(self.tokenizer(text, add_special_tokens=not self.chats, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if not self.chats and not self.encoder_decoder and eos is not None and ids[-1:] == [eos]:
            ids.pop()  # the text goes on
        if not ids:
            raise UserError(f"{prompt.where}: expected a prompt, got an empty one")
        most = None if self.longest is None else self.longest - (not self.encoder_decoder)
        if most is not None and len(ids) > most:
            raise UserError(f"{prompt.where}: expected at most {most} tokens, as the model can take, got {len(ids)}")
        return ids

    def _templated(self, prompt: Prompt) -> str:
        messages = [{"role": "user", "content": prompt.given}]
        if isinstance(prompt.given, list):
            messages = messages_of({"messages": prompt.given}, prompt.where)
            if messages[-1]["role"] == "assistant":
                raise UserError(f"{prompt.where}: expected messages that end before the answer, got an answer too")
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **prompt.variables
            )
        except Exception as error:  # a template is a program: what it does may fail in any way
            roles = ", ".join(message["role"] for message in messages)
            reason = str(error) or type(error).__name__
            raise UserError(f"{prompt.where}: the chat template refuses the roles {roles}: {reason}") from error
        return text


class Generator:
    """Token ids of prompts to text.

    Args:
        model, tokenizer: from models.tuned.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.encoder_decoder = bool(model.config.is_encoder_decoder)

    def stream(self, prompt: list[int], sampling: Sampling, to: TextIO) -> None:
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

    def answers(self, prompts: Sequence[list[int]], sampling: Sampling, batch_size: int) -> Iterator[str]:
        """One answer a prompt, in their order."""
        for start in range(0, len(prompts), batch_size):
            yield from self._generate(prompts[start : start + batch_size], sampling)

    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, streamer: Any = None) -> list[str]:
        batch = self._padded(prompts)
        start = 0 if self.encoder_decoder else batch["input_ids"].shape[1]
        longest = positions(self.model.config)
        if longest is not None:  # beyond them some models fail, and others say anything
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, longest - start))
        ids = self.model.generate(
            **batch,
            **sampling.options(),
            **begins_with(self.tokenizer),
            streamer=streamer,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.tokenizer),
        )
        texts: list[str] = self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _padded(self, prompts: Sequence[list[int]]) -> dict[str, Any]:
        """input_ids and attention_mask, (prompts, tokens) each: decoders go on at the right."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if self.encoder_decoder else slice(longest - len(prompt), longest)
            ids[row, place] = torch.tensor(prompt)
            mask[row, place] = 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
