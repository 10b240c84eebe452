#!/usr/bin/env python3
"""Train the small decoder that ships with fastpeft for the offline quickstart.

The *base model* reads the sources of the Python standard library.  The *fine-tuning text* is
Python documentation as shipped in ``pydoc_data.topics``, split by topic into ``train.txt`` and
``held_out.txt``; the base model never sees it.  ``python scripts/train_quickstart_base.py``
rebuilds ``fastpeft/quickstart/assets`` in about 35 minutes; two cores are enough.
"""

import argparse
import math
import re
import sys
import sysconfig
import time
import zlib
from pathlib import Path
from pydoc_data.topics import topics as TOPICS

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "fastpeft" / "quickstart" / "assets"
STDLIB = Path(sysconfig.get_path("stdlib"))
# Not the library proper, the fine-tuning text, tests, generated tables, settings of the machine.
SKIP = re.compile(
    r"(^|/)(site-packages|dist-packages|tests?|idle_test|pydoc_data|lib2to3|msilib"
    r"|encodings|__\w+__|config-[^/]*)/|(^|/)(entities|stringprep|_sysconfigdata)"
)
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
LONG_LINE = 60  # a longer line identifies a passage: it may occur on one side of a split only
MAX_TEXT, MAX_HELD_OUT, MAX_MODEL = 299_000, 42_000, 8_000_000  # bytes
BATCH, SEQ, WARMUP, LEARNING_RATE = 8, 256, 100, 2e-3
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "--"})
NOTICE = """\
text/: Python documentation (mostly the Language Reference), taken from the module
pydoc_data.topics of Python {version}, Copyright (c) Python Software Foundation; All Rights
Reserved.  Licensed under the PSF License Version 2 (below).  Changes: heading underlines and
footnote marks removed, typographic quotes and dashes replaced by ASCII ones, repeated
paragraphs removed, topics selected and split into two files.

model/: a small Llama-type decoder and its tokenizer, trained from scratch by
scripts/train_quickstart_base.py of this project on the sources of the standard library of
Python {version} (Copyright (c) Python Software Foundation, PSF License Version 2).  It was
not trained on the text above.  It serves demonstrations and tests only.

------------------------------------------------------------------------
{terms}
"""


def long_lines(text: str) -> set[str]:
    """The stripped lines of ``text`` that are long enough to identify a passage."""
    return {s for s in map(str.strip, text.splitlines()) if len(s) > LONG_LINE}


def clean_topic(text: str) -> str:
    """Plain prose: no heading underlines, footnote marks or typographic quotes."""
    text = text.translate(ASCII)
    text = re.sub(r"(?m)^[ \t]*([*=\-~^#])\1{3,}[ \t]*$\n?", "", text)
    text = re.sub(r"(?m)^-\[ (.*) \]-$", r"\1", text)
    text = re.sub(r" \[\d+\](?=[\s.,;:)]|$)", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def topic_groups() -> list[str]:
    """Merge topics which share a passage; within one group, keep each paragraph once."""
    topics = {name: clean_topic(text) for name, text in sorted(TOPICS.items())}
    group = {name: name for name in topics}
    owner: dict[str, str] = {}
    for name, text in topics.items():
        for line in long_lines(text):
            old, new = group[owner.setdefault(line, name)], group[name]
            group = {k: (new if g == old else g) for k, g in group.items()}
    merged = []
    for root in sorted(set(group.values())):
        names = sorted((n for n in topics if group[n] == root), key=lambda n: -len(topics[n]))
        paragraphs = (p.rstrip() for n in names for p in topics[n].split("\n\n"))
        merged.append("\n\n".join(dict.fromkeys(paragraphs)) + "\n")
    return sorted(merged, key=lambda text: zlib.crc32(text.encode()))  # a fixed shuffle


def fine_tuning_text() -> tuple[str, str]:
    """(train, held_out) from the documentation topics, with no long line in common."""
    train_text = held_text = ""
    for text in topic_groups():
        if len(text) < min(MAX_HELD_OUT // 2, MAX_HELD_OUT - len(held_text)):
            held_text += "\n" * bool(held_text) + text
        else:
            train_text += "\n" * bool(train_text) + text
    while len((train_text + held_text).encode()) > MAX_TEXT:  # cut paragraphs from the end
        train_text = train_text.rstrip().rpartition("\n\n")[0] + "\n"
    assert not long_lines(train_text) & long_lines(held_text), "train and held-out text overlap"
    return train_text, held_text


def base_text(forbidden: str) -> tuple[list[str], list[str]]:
    """(training, validation) files of the standard library, without long lines of ``forbidden``."""
    sides: dict[bool, list[str]] = {False: [], True: []}
    for path in sorted(STDLIB.rglob("*.py")):
        rel = path.relative_to(STDLIB).as_posix()
        lines = [] if SKIP.search(rel) else path.read_text("utf-8").expandtabs().splitlines()
        drop = {s for s in long_lines("\n".join(lines)) if s in forbidden}
        doc = "\n".join(s for s in lines if s.strip() not in drop) + "\n"
        assert all(s not in forbidden for s in long_lines(doc)), rel
        if doc.count("\n") > 3:
            sides[zlib.crc32(rel.encode()) % 25 == 0].append(doc)
    return sides[False], sides[True]


def make_tokenizer(docs: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be encoded."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        docs,
        trainers.BpeTrainer(
            vocab_size=3072,
            special_tokens=[BOS, EOS, PAD],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=1024
    )


def encode(tok: PreTrainedTokenizerFast, docs: list[str]) -> torch.Tensor:
    """All documents as one row of token ids, each framed by BOS and EOS."""
    rows = tok([BOS + doc + EOS for doc in docs], add_special_tokens=False)["input_ids"]
    return torch.tensor([i for row in rows for i in row])


def save(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights as fp16 on disk (tied ones once); the config asks for fp32, as suits a CPU."""
    weights = {k: v.half() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(out, state_dict=weights)
    tok.save_pretrained(out)
    path = out / "tokenizer_config.json"  # name the class that every transformers release knows
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (out / "model.safetensors").chmod(0o644)
    assert sum(p.stat().st_size for p in out.iterdir()) <= MAX_MODEL


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Perplexity over at most 128 consecutive windows."""
    rows = ids[: len(ids) // SEQ * SEQ].view(-1, 1, SEQ)[:128]
    return math.exp(sum(model(input_ids=r, labels=r).loss.item() for r in rows) / len(rows))


def train_model(model: LlamaForCausalLM, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW; the cosine schedule runs over the wall time allowed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        step += 1
        done = min(1, (time.monotonic() - start) / (60 * args.minutes))
        lr = LEARNING_RATE * min(1, step / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * done))
        for group in opt.param_groups:
            group["lr"] = lr
        at = torch.randint(len(ids) - SEQ, (BATCH, 1)) + torch.arange(SEQ)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids[at], labels=ids[at]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if step % 50 == 0:
            print(f"step {step} ({done:.0%}) loss {loss.item():.3f}", flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=ASSETS)
    ap.add_argument("--minutes", type=float, default=33, help="wall time of the training")
    ap.add_argument("--bf16", action="store_true", help="autocast; faster with AVX512-BF16")
    args = ap.parse_args()
    torch.manual_seed(0)

    train_text, held_text = fine_tuning_text()
    licence = (STDLIB / "LICENSE.txt").read_text("utf-8")
    start = licence.index("\nPYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n")
    terms = licence[start : licence.index("\nBEOPEN.COM LICENSE")].strip()
    notice = NOTICE.format(version=".".join(map(str, sys.version_info[:2])), terms=terms)
    texts = {"text/train.txt": train_text, "text/held_out.txt": held_text, "NOTICE": notice}
    for name, text in texts.items():
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
        (args.out / name).write_text(text, encoding="utf-8", newline="\n")
    docs, valid = base_text(forbidden="\n".join([*texts.values(), *TOPICS.values()]))
    tok = make_tokenizer(docs)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )
    train_model(model, encode(tok, docs), args)
    save(model, tok, args.out / "model")
    for name, sample in {"standard library": valid, "held_out.txt": [held_text]}.items():
        print(f"perplexity on {name}: {perplexity(model, encode(tok, sample)):.2f}")


if __name__ == "__main__":
    main()
