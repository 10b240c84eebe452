"""`fastpeft train` on wrong data, or on data that do not go with the model: one line says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import Checkpoints

from .wrong import CHATS, CLASSES, PAIRS, TEXTS, Wrong, chat, data, fit, lines, option, rows

_KINDS = (
    "messages, conversations, prompt + completion, instruction + output, text + label, tokens + tags, "
    "question + context + answers, text"
)
_SUFFIXES = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md"
FILES = [
    option(
        "near-file",
        "--data text.jsonl",
        "data.path: expected a file, a folder or a hub ID, got text.jsonl, which is not there; "
        "did you mean texts.jsonl?",
    ),
    option(
        "eval-not-there",
        "--eval-path ./held/out.csv",
        "data.eval_path: expected a file, a folder or a hub ID, got ./held/out.csv, which is not there",
    ),
    data("suffix", "some.xlsx", "x", f"data.path: expected one of {_SUFFIXES}, got some.xlsx"),
    data("empty", "some.jsonl", "", "data.path: expected at least one row, got an empty file: some.jsonl"),
    data("header-only", "some.csv", "text\n", "data.path: expected at least one row, got none in some.csv"),
    data("blank", "some.txt", " \n", "data: document 1, column text: expected text, got an empty one"),
    data("no-utf-8", "some.txt", b"caf\xe9", "data.path: some.txt cannot be read as text: …"),
    data(
        "json",
        "some.jsonl",
        '{"text": "a"}\n\n{"text": \n',
        "data.path: some.jsonl, line 3: not valid JSON: Expecting value at column 9",
    ),
    data(
        "json-list",
        "some.jsonl",
        '{"text": "a"}\n["b"]\n',
        "data.path: some.jsonl, line 2: expected a JSON object, got list",
    ),
    data("json-text", "some.json", "text", "data.path: some.json cannot be read as json: …"),
    rows("json-types", {"text": "a"}, {"text": 3}, "data: row 2, column text: expected text, got '3' (int)"),
    data("no-parquet", "some.parquet", "PAR0", "data.path: some.parquet cannot be read as parquet: …"),
    data(
        "csv-more",
        "some.csv",
        'text,label\n\n"a\nb",c\nit is slow, it is quick,d\n',
        "data.path: some.csv, line 5: expected 2 fields, as in the header, got 3; a text with the separator in it is "
        "put in quotes",
    ),
    data(
        "csv-more-in-every-line",
        "some.csv",
        "text,label\nit is slow, it is quick,d\n",
        "data.path: some.csv, line 2: expected 2 fields, as in the header, got 3; a text with the separator in it is "
        "put in quotes",
    ),
    data(
        "tsv-fewer",
        "some.tsv",
        "id\ttext\n1\n",
        "data.path: some.tsv, line 2: expected 2 fields, as in the header, got 1",
    ),
    data("csv-quote", "some.csv", 'text\n"a\n', "data.path: some.csv cannot be read as csv: …"),
    data("csv-no-utf-8", "some.csv", b"text\ncaf\xe9\n", "data.path: some.csv cannot be read as csv: …"),
    data(
        "csv-twice", "some.csv", "text,text\na,b\n", "data.path: some.csv: expected each column once, got 'text' twice"
    ),
    data(
        "csv-empty-label",
        "some.csv",
        "text,label\na,1\nb,\nc,2\n",
        "data: row 2, column label: expected a class as text or whole number, got null",
    ),
    Wrong(
        "csv-other-columns",
        "--model shipped@ --data folder",
        "data.path: expected the columns text in folder/b.csv too, got txt",
        {"folder/a.csv": "text\na\n", "folder/b.csv": "txt\na\n"},
    ),
    Wrong(
        "mixed-folder",
        "--model shipped@ --data folder",
        "data.path: expected files of one kind, got csv and tsv in folder",
        {"folder/a.csv": "text\na\n", "folder/b.tsv": "text\na\n"},
    ),
    Wrong(
        "empty-folder",
        "--model shipped@ --data folder",
        f"data.path: expected a folder with files of {_SUFFIXES}, got none in folder",
        {"folder/README.md": "About this data."},
    ),
    Wrong(
        "broken-folder",
        "--model shipped@ --data folder",
        "data.path: folder cannot be read as saved by datasets: …",
        {"folder/state.json": "{"},
    ),
    option("split", "--split test", "data.split: expected none, because texts.jsonl has no splits, got 'test'"),
    option(
        "eval-split",
        "--eval-split test",
        "data.eval_split: expected none, because texts.jsonl has no splits, got 'test'",
    ),
    option("name", "--data.name de", "data.name: expected null for what is no data set on the hub, got 'de'"),
]

COLUMNS = [
    rows(
        "unknown",
        {"xyz": "a"},
        {"xyz": "b"},
        f"data: expected columns {_KINDS}; got xyz; data.columns gives yours their names",
    ),
    rows(
        "near",
        {"texts": "a"},
        {"texts": "b"},
        f"data: expected columns {_KINDS}; got texts; did you mean data.columns {{text: texts}}?",
    ),
    option(
        "expected-name",
        "--data.columns.txt text",
        "data.columns.txt: expected one of messages, system, conversations, prompt, completion, instruction, output, "
        "input, history, text, label, text_pair, tokens, tags, question, context, answers, did you mean 'text'?",
    ),
    option(
        "given-name",
        "--columns '{text: txt}'",
        "data.columns.text: expected one of text, got 'txt', did you mean 'text'?",
    ),
    rows(
        "preferences",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "data: expected texts to learn from, got preferences (chosen, rejected): those are for TRL's DPOTrainer, "
        "after fastpeft.accelerate(model)",
    ),
    option(
        "eval-columns",
        "--eval-path pairs.jsonl",
        "data.eval_path: expected columns text, as data.path has them, got prompt, completion",
        pairs__jsonl=PAIRS["pairs.jsonl"],
    ),
    fit(
        "for-the-task",
        "shipped",
        PAIRS,
        "data: expected columns text for task masked-lm, got prompt, completion",
        "--task masked-lm",
    ),
]

TEXT, MESSAGES = {"text": "some words"}, chat("user", "assistant")
ROWS = [
    rows("null", TEXT, {"text": None}, "data: row 2, column text: expected text, got null"),
    rows("empty", TEXT, {"text": " "}, "data: row 2, column text: expected text, got an empty one"),
    rows("no-text", {"text": 3}, {"text": 4}, "data: row 1, column text: expected text, got '3' (int)"),
    rows(
        "no-completion",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a"},
        "data: row 2, column completion: expected text, got null",
    ),
    rows(
        "empty-completion",
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "b"},
        "data: row 1, column completion: expected text, got an empty one",
    ),
    rows("null-messages", MESSAGES, {"messages": None}, "data: row 2: expected a list of messages, got null"),
    rows(
        "messages-as-text",
        {"messages": "[]"},
        {"messages": "[]"},
        "data: row 1: expected a list of messages, got '[]' (str)",
    ),
    rows("no-messages", MESSAGES, {"messages": []}, "data: row 2: expected a list of messages, got '[]' (list)"),
    rows(
        "no-mapping",
        {"messages": ["hello"]},
        {"messages": ["hello"]},
        "data: row 1, message 1: expected a mapping with role and content, got 'hello' (str)",
    ),
    rows("no-role", MESSAGES, {"messages": [{"content": "a"}]}, "data: row 2, message 1: expected a role, got null"),
    rows(
        "no-content",
        MESSAGES,
        {"messages": [*MESSAGES["messages"], {"role": "user"}]},
        "data: row 2, message 3: expected content as text, got null",
    ),
    rows(
        "no-assistant",
        MESSAGES,
        chat("user", "system"),
        "data: row 2: expected a turn of the assistant, got the roles user, system",
    ),
    rows(
        "picture-part",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
        {"messages": []},
        "data: row 1, message 1: expected parts of text only, got \"{'type': 'image'}\" (dict)",
    ),
    rows(
        "instruction",
        {"instruction": "a", "output": "b"},
        {"instruction": None, "output": "b"},
        "data: row 2, message 1: expected content as text, got null",
    ),
    rows(
        "no-output",
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": None},
        "data: row 2, message 2: expected content as text, got null",
    ),
    rows(
        "label-null",
        {"text": "a", "label": "x"},
        {"text": "b", "label": None},
        "data: row 2, column label: expected a class as text or whole number, got null",
    ),
    rows(
        "label-float",
        {"text": "a", "label": 1.0},
        {"text": "b", "label": 2.0},
        "data: row 1, column label: expected a class as text or whole number, got '1.0' (float); data.problem_type "
        "regression learns numbers",
    ),
    rows(
        "label-list",
        {"text": "a", "label": ["x"]},
        {"text": "b", "label": ["y"]},
        "data: row 1, column label: expected a class as text or whole number, got \"['x']\" (list)",
        "--data.problem_type single_label_classification",
    ),
    rows(
        "one-class",
        {"text": "a", "label": "x"},
        {"text": "b", "label": "x"},
        "data: expected 2 to 1000 classes in column label, got one: 'x'",
    ),
    rows(
        "label-not-named",
        {"text": "a", "label": "x"},
        {"text": "b", "label": "z"},
        "data: row 2, column label: expected one of x, y, got 'z'",
        "--labels [x,y]",
    ),
    rows(
        "label-named-twice",
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
        "data.labels: expected at least two names, each once, got 'x' twice",
        "--labels [x,y,x]",
    ),
    rows(
        "one-label-named",
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
        "data.labels: expected at least two names, each once, got ['x']",
        "--labels [x]",
    ),
    fit(
        "eval-label",
        "bert",
        CLASSES | {"held.jsonl": lines({"text": "a", "label": "x"}, {"text": "b", "label": "z"})},
        "data.eval_path: row 2, column label: expected one of x, y, got 'z'",
        "--eval-path held.jsonl",
    ),
    fit(
        "eval-text",
        "shipped",
        TEXTS | {"held.jsonl": lines({"text": None})},
        "data.eval_path: row 1, column text: expected text, got null",
        "--eval-path held.jsonl",
    ),
    rows(
        "rewriting-template",
        chat("user", "assistant", "user", "assistant"),
        MESSAGES,
        "data.assistant_only: the chat template rewrites earlier turns once later ones follow, so the assistant's "
        "tokens cannot be told; set it to false, or data.chat_template to one with {% generation %}",
        "--chat-template last.jinja",
    ),
    rows(
        "refusing-template",
        MESSAGES,
        chat("system", "user", "assistant"),
        "data: row 2: the chat template refuses the roles system, user, assistant: no system, please",
        "--chat-template no.jinja",
    ),
]

FITS = [
    fit(
        "chats-for-an-encoder",
        "bert",
        CHATS,
        "model.name: expected a decoder (causal language model) for data with columns messages, got bert@, which is "
        "BertForMaskedLM",
    ),
    fit(
        "chats-for-an-encoder-decoder",
        "t5",
        CHATS,
        "model.name: expected a decoder (causal language model) for data with columns messages, got t5@, which is "
        "T5ForConditionalGeneration",
    ),
    fit(
        "pairs-for-an-encoder",
        "bert",
        PAIRS,
        "model.name: expected a decoder (causal language model) or an encoder-decoder for data with columns prompt + "
        "completion, got bert@, which is BertForMaskedLM",
    ),
    fit(
        "decoder-as-encoder-decoder",
        "shipped",
        PAIRS,
        "model.name: expected an encoder-decoder for data with columns prompt + completion, got shipped@, which is "
        "LlamaForCausalLM",
        "--task seq2seq-lm",
    ),
    fit(
        "decoder-as-masked",
        "shipped",
        TEXTS,
        "model.name: expected an encoder with a masked-language head for data with columns text, got shipped@, which "
        "is LlamaForCausalLM",
        "--task masked-lm",
    ),
    fit(
        "encoder-as-decoder",
        "bert",
        TEXTS,
        "model.name: expected a decoder (causal language model) for data with columns text, got bert@, which is "
        "BertForMaskedLM",
        "--task causal-lm",
    ),
    fit(
        "text-for-an-encoder-decoder",
        "marian",
        TEXTS,
        "model.name: expected a tokenizer with sentinels (<extra_id_0>, ...) and an end token, as T5's has, to "
        "learn from texts alone, got one without",
    ),
    fit(
        "chats-for-a-classifier",
        "bert",
        CHATS,
        "data: expected columns text + label for task sequence-classification, got messages",
        "--task sequence-classification",
    ),
    fit(
        "packed-classes",
        "bert",
        CLASSES,
        "data.packing: expected false for task sequence-classification, got true",
        "--packing",
    ),
    option(
        "too-long", "--max-length 1025", "data.max_length: expected at most 1024, the model's last position, got 1025"
    ),
    option("too-short", "--max-length 1", "data.max_length: expected at least 2, got 1"),
    fit(
        "too-long-for-the-encoder",
        "bert",
        CLASSES,
        "data.max_length: expected at most 64, the model's last position, got 65",
        "--max-length 65",
    ),
    option(
        "nothing-left",
        "--data chats.jsonl --max-length 4",
        "data.max_length: expected rows with something to learn within 4 tokens, got none",
        **{"chats.jsonl": CHATS["chats.jsonl"]},
    ),
    option("fraction", "--eval-fraction 1", "data.eval_fraction: expected 0 to below 1, got 1.0"),
    option("negative-fraction", "--eval-fraction -0.1", "data.eval_fraction: expected 0 to below 1, got -0.1"),
    option(
        "fraction-of-all",
        "--eval-fraction 0.9",
        "data.eval_fraction: expected at least one row on either side, got 2 in all",
    ),
    option(
        "fraction-and-path",
        "--eval-fraction 0.1 --eval-path texts.jsonl",
        "data.eval_fraction: expected it alone, got data.eval_path too",
    ),
    option("limit", "--limit 0", "data.limit: expected at least 1, got 0"),
    option(
        "end", "--eos-token nothing", "data.eos_token: expected a token of the tokenizer's vocabulary, got 'nothing'"
    ),
    Wrong(
        "no-head",
        "--model bert-without-head@ --data texts.jsonl",
        "model.name: bert-without-head@ has no values for cls.predictions, cls.predictions.decoder, "
        "cls.predictions.transform.LayerNorm, cls.predictions.transform.dense, so its head would be random; take a "
        "checkpoint with a head, or name these in lora.modules_to_save",
        TEXTS,
        loads=True,
    ),
]


@pytest.mark.parametrize("case", FILES + COLUMNS + ROWS + FITS, ids=lambda case: case.id)
def test_one_line_says_what_is_wrong(
    case: Wrong,
    tmp_path: Path,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "last.jinja").write_text(
        "{% for message in messages %}{{ message.role if loop.last else '-' }}: {{ message.content }}\n{% endfor %}"
    )
    (tmp_path / "no.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    )
    case.check(tmp_path, checkpoints, capsys, monkeypatch)
