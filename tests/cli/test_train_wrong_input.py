"""`fastpeft train` on a wrong command line, configuration, model or setting: one line says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.memory.plan.optimizer_state import OPTIMIZERS
from tests.checkpoints import Checkpoints

from .wrong import CHATS, TEXTS, Wrong, option


def yaml(id: str, text: str, message: str) -> Wrong:
    return Wrong(id, "run.yaml", message, {"run.yaml": text})


CONFIGURATION = [
    yaml("nested-key", "lora: {rank: 8}", "lora.rank: unknown key, did you mean 'lora.r'?"),
    yaml("top-level-leaf", "learning_rate: 1", "learning_rate: unknown key, did you mean 'training.learning_rate'?"),
    yaml("section", "trainings: {}", "trainings: unknown key, did you mean 'training'?"),
    yaml("type", "lora: {r: eight}", "lora.r: expected int, got 'eight' (str)"),
    yaml("list", "- lora", "top level: expected a mapping, got ['lora'] (list)"),
    yaml("value-for-section", "lora: 8", "lora: expected a mapping, got 8 (int)"),
    yaml(
        "axolotl-offload",
        "gradient_checkpointing: offload",
        "gradient_checkpointing: got 'offload', did you mean 'memory.activations: offload'?",
    ),
    yaml(
        "unsloth-checkpointing",
        "memory: {gradient_checkpointing: unsloth}",
        "memory.gradient_checkpointing: got 'unsloth', did you mean 'memory.activations: offload'?",
    ),
    yaml(
        "offloading",
        "activation_offloading: true",
        "activation_offloading: unknown key, did you mean 'memory.activations'?",
    ),
    yaml("literal", "method: qloar", "method: expected one of 'lora', 'qlora', got 'qloar', did you mean 'qlora'?"),
    yaml(
        "repeated-key",
        "lora: {r: 8, r: 16}",
        "run.yaml: not valid YAML: the key 'r' comes twice in \"<unicode string>\", line 1, column 7: "
        "lora: {r: 8, r: 16} ^",
    ),
    yaml("date", "lora: {alpha: 2024-13-45}", "lora.alpha: expected float, got '2024-13-45' (str)"),
    yaml("number", "lora: {r: !!int many}", "run.yaml: not valid YAML: …"),
    yaml("endless", "lora: &a {extra: *a}", "run.yaml: not valid YAML: something in it holds itself"),
    yaml("deep", "[" * 2000, "run.yaml: not valid YAML: …"),
    yaml("no-yaml", "lora: [", "run.yaml: not valid YAML: …line 1, column 8: lora: [ ^"),
    Wrong(
        "latin-1", "run.yaml", "CONFIG: expected text in UTF-8, got something else in run.yaml", {"run.yaml": b"\xe9"}
    ),
    Wrong("not-there", "runn.yaml", "CONFIG: expected a YAML file, got runn.yaml, which is not there"),
    Wrong(
        "near-config",
        "runn.yaml",
        "CONFIG: expected a YAML file, got runn.yaml, which is not there; did you mean run.yaml?",
        {"run.yaml": ""},
    ),
    Wrong(
        "unknown-option", "--lerning-rate 1", "--lerning_rate: no such option, did you mean --training.learning_rate?"
    ),
    Wrong("far-option", "--zzzzzz 1", "--zzzzzz: no such option; --help lists all"),
    Wrong("own-option", "--overwite", "--overwite: no such option, did you mean --overwrite?"),
    Wrong(
        "ambiguous-option",
        "--name some",
        "--name: expected one of --model.name, --data.name, --strategy.name, got their last part alone",
    ),
    Wrong("no-value", "--lora.r --overwrite", "--lora.r: expected a value, got none"),
    Wrong("no-value-at-the-end", "--lora.r", "--lora.r: expected a value, got none"),
    Wrong("option-type", "--lora.r many", "lora.r: expected int, got 'many' (str)"),
    Wrong("option-no-yaml", "--lora.r [", "lora.r: not valid YAML: …line 1, column 2: [ ^"),
    Wrong("switch-type", "--packing=2", "data.packing: expected bool, got 2 (int)"),
    Wrong("null", "--output-dir null", "training.output_dir: expected str, got null"),
    Wrong("below-a-leaf", "--lora.r.x 8", "--lora.r.x: no such option, did you mean --lora.r?"),
    Wrong("two-configs", "run.yaml more.yaml", "Got unexpected extra argument…(more.yaml)", {"run.yaml": ""}),
]

_NEITHER = "model.name: expected a model's folder or its ID on the hub, got"
MODELS = [
    Wrong("no-model", "--data texts.jsonl", f"{_NEITHER} nothing"),
    Wrong("no-data", "--model shipped@", "data.path: expected a file, a folder or a hub ID, got nothing"),
    Wrong("model-not-there", "--model ./modle --data texts.jsonl", f"{_NEITHER} './modle', which is neither"),
    Wrong(
        "near-model",
        "--model ./modle --data texts.jsonl",
        f"{_NEITHER} './modle', which is neither; did you mean model?",
        {"model/some.txt": ""},
    ),
    Wrong(
        "model-is-a-file",
        "--model texts.jsonl --data texts.jsonl",
        f"{_NEITHER} 'texts.jsonl', which is neither",
        TEXTS,
    ),
    Wrong(
        "an-adapter",
        "--model tuned --data texts.jsonl",
        "model.name: expected a base model, got an adapter: tuned",
        {"tuned/adapter_config.json": "{}"},
    ),
    Wrong(
        "no-config",
        "--model some --data texts.jsonl",
        "model.name: expected a folder with a config.json, got some",
        {"some/model.bin": ""},
    ),
    Wrong(
        "no-json",
        "--model some --data texts.jsonl",
        "model.name: CWD/some could not be loaded: It looks like the config file at 'CWD/some/config.json' is not a "
        "valid JSON file.",
        {"some/config.json": "{"},
    ),
    Wrong(
        "no-object",
        "--model some --data texts.jsonl",
        "model.name: CWD/some could not be loaded: Unrecognized model in CWD/some. Should have a `model_type` key in "
        "its config.json.",
        {"some/config.json": "[]"},
    ),
    Wrong(
        "no-tokenizer",
        "--model some --data texts.jsonl",
        "model.name: no tokenizer: CWD/some could not be loaded: …",
        {"some/config.json": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', **TEXTS},
    ),
    option("revision", "--revision v2", "model.revision: expected null for a folder, got 'v2'"),
    option("float16", "--dtype float16", "model.dtype: expected float32 or bfloat16 on a CPU, got float16"),
    option(
        "qlora-none",
        "--method qlora --quantization none",
        "model.quantization: expected 'nf4' or 'fp4' for method qlora, got 'none'",
    ),
    option(
        "qlora-int8",
        "--method qlora --quantization int8",
        "model.quantization: expected 'nf4' or 'fp4' for method qlora, got 'int8'",
    ),
    option("attention", "--attention flash_attention_2", "model.attention: FlashAttention2 …", loads=True),
]

_PROJECTIONS = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
ADAPTERS = [
    option("rank", "--lora.r 0", "lora.r: expected at least 1, got 0"),
    option("alpha", "--lora.alpha 0", "lora.alpha: expected more than 0, got 0.0"),
    option("dropout", "--lora.dropout 1", "lora.dropout: expected 0 to below 1, got 1.0"),
    option(
        "extra-key",
        "--lora.extra.rank_patern {}",
        "lora.extra.rank_patern: unknown key, did you mean 'rank_pattern'?",
    ),
    option("extra-of-ours", "--lora.extra.lora_alpha 8", "lora.extra.lora_alpha: expected lora.alpha instead"),
    option("task-type", "--lora.extra.task_type CAUSAL_LM", "lora.extra.task_type: expected model.task instead"),
    option(
        "several-targets",
        "--lora_target_modules q_proj v_proj",
        "--lora_target_modules: expected one value, got q_proj v_proj; write several as [q_proj, v_proj]",
    ),
    option(
        "targets-with-commas",
        "--target-modules q_proj,v_porj",
        "lora.target_modules: no module has the name 'v_porj', did you mean 'v_proj'?",
        loads=True,
    ),
    option(
        "targets",
        "--target-modules [q_porj]",
        "lora.target_modules: no module has the name 'q_porj', did you mean 'q_proj'?",
        loads=True,
    ),
    option(
        "one-of-the-targets",
        "--target-modules '[q_proj, query]'",
        f"lora.target_modules: no module has the name 'query'; the projections are {_PROJECTIONS}",
        loads=True,
    ),
    option(
        "expression",
        "--target-modules (q",
        "lora.target_modules: not a valid regular expression: missing ), unterminated subpattern at position 0",
    ),
    option("endless-alpha", "--lora.alpha .inf", "lora.alpha: expected a finite number, got inf"),
    option(
        "huge-rank",
        "--lora.r 100000000000",
        "lora.r: expected an adapter that fits into memory, got 100000000000",
        loads=True,
    ),
    option(
        "pattern",
        "--lora.extra '{rank_pattern: 3}'",
        "lora.extra.rank_pattern: expected dict[str, int], got 3 (int)",
    ),
    option(
        "pattern-value",
        "--lora.extra.alpha_pattern '{q_proj: many}'",
        "lora.extra.alpha_pattern.q_proj: expected float, got 'many' (str)",
    ),
    option(
        "saved",
        "--modules-to-save [head]",
        "lora.modules_to_save: no module has the name 'head', did you mean 'lm_head'?",
        loads=True,
    ),
    option(
        "head",
        "--target-modules [lm_head]",
        "lora.target_modules: expected none of the head's modules, got lm_head",
        loads=True,
    ),
    option("initial", "--init-lora-weights gaus", "lora: Unknown initialization init_lora_weights='gaus'", loads=True),
]

TRAINING = [
    option(f"negative-{name}", f"--{name} {value}", f"training.{name}: expected at least {least}, got {value}")
    for name, value, least in [
        ("learning_rate", -1.0, 0),
        ("warmup_steps", -1.0, 0),
        ("weight_decay", -0.5, 0),
        ("max_grad_norm", -1.0, 0),
        ("seed", -1, 0),
        ("per_device_train_batch_size", 0, 1),
        ("per_device_eval_batch_size", 0, 1),
        ("gradient_accumulation_steps", 0, 1),
        ("logging_steps", 0, 1),
        ("eval_steps", 0, 1),
        ("save_steps", -5, 1),
        ("save_total_limit", 0, 1),
    ]
] + [
    option("nan", "--learning-rate .nan", "training.learning_rate: expected at least 0, got nan"),
    option("endless-rate", "--learning-rate .inf", "training.learning_rate: expected a finite number, got inf"),
    option("endless-warmup", "--warmup-steps .inf", "training.warmup_steps: expected a finite number, got inf"),
    option("endless", "--epochs .inf", "training.num_train_epochs: expected a finite number, got inf"),
    option("beta", "--training.extra.adam_beta1 abc", "training.extra.adam_beta1: expected float, got 'abc' (str)"),
    option(
        "large-beta",
        "--training.extra.adam_beta1 5",
        "training.optim: adamw_torch: Invalid beta parameter at index 0: 5",
        loads=True,
    ),
    option(
        "noise",
        "--training.extra.neftune_noise_alpha abc",
        "training.extra.neftune_noise_alpha: expected float or null, got 'abc' (str)",
    ),
    option(
        "workers",
        "--training.extra.dataloader_num_workers -3",
        "training.extra.dataloader_num_workers: num_workers option should be non-negative; …",
    ),
    option("epochs", "--epochs 0", "training.num_train_epochs: expected more than 0, got 0.0"),
    option("steps", "--max-steps 0", "training.max_steps: expected at least 1, or -1 for no limit, got 0"),
    option("large-seed", "--seed 4294967296", "training.seed: expected less than 2^32, got 4294967296"),
    option(
        "output-nowhere",
        "--output-dir /proc/out",
        "training.output_dir: expected a folder that can be written, got /proc/out",
    ),
    option("no-output", "--output-dir ''", "training.output_dir: expected a folder, got nothing"),
    option(
        "output-is-a-file",
        "--output-dir texts.jsonl",
        "training.output_dir: expected a folder or a new name, got a file: texts.jsonl",
    ),
    option(
        "foreign-folder",
        "--output-dir mine --overwrite",
        "training.output_dir: expected a folder of a run or a new one, got mine, with a README.md",
        **{"mine/README.md": "My notes."},
    ),
    option(
        "folder-of-a-model",
        "--output-dir mine --overwrite",
        "training.output_dir: expected a folder of a run or a new one, got a model's: mine",
        **{"mine/config.json": "{}", "mine/model-00001-of-00002.safetensors": ""},
    ),
    option(
        "folder-of-the-model",
        "--model ./mine --output-dir more/../mine",
        "training.output_dir: expected another folder than model.name, got more/../mine",
        **{"mine/config.json": "{}", "mine/model.bin": "", "more/notes": ""},
    ),
    option(
        "holds-a-run",
        "--output-dir done",
        "training.output_dir: done holds a run already: --resume goes on with it, --overwrite replaces it",
        **{"done/adapter_config.json": "{}", "done/adapter_model.safetensors": ""},
    ),
    option("resume-nothing", "--resume", "--resume: expected a run in training.output_dir, got none in runs/fastpeft"),
    option(
        "resume-without-checkpoint",
        "--resume --output-dir done",
        "--resume: expected a checkpoint in training.output_dir, got none in done",
        **{"done/config.yaml": "method: lora"},
    ),
    option(
        "resume-and-overwrite",
        "run.yaml --resume --overwrite",
        "--resume: expected it without --overwrite, got both",
        run__yaml="",
    ),
    option("budget", "--budget-gib 0", "memory.budget_gib: expected more than 0 and less than 2^20, got 0.0"),
    option("ring", "--ring 0", "memory.ring: expected at least 1, got 0"),
    option("decoded", "--decoded 4G", "memory.decoded: expected a size such as 24GiB or 24GB, got '4G'"),
    option(
        "plain-memory",
        "--acceleration.enabled false --streamed",
        "memory.streamed: expected false with acceleration.enabled false",
    ),
    option(
        "checkpointing-and-offload",
        "--gradient-checkpointing --activations offload",
        "memory.gradient_checkpointing: expected false with memory.activations offload, got true",
    ),
    option(
        "unsloth",
        "--activations unsloth",
        "memory.activations: got 'unsloth', did you mean 'memory.activations: offload'?",
    ),
    option(
        "optimizer-budget",
        "--budget-gib 8 --optim adafactor",
        f"memory.budget_gib: expected training.optim to be one of {', '.join(OPTIMIZERS)}, got 'adafactor'",
    ),
    option(
        "strategy",
        "--strategy.name dpo",
        "strategy.name: expected one of task, domain, few-shot, distillation, dynamic, multi-task, got 'dpo'",
    ),
    option(
        "schedule",
        "--lr-scheduler-type cosin",
        "training.lr_scheduler_type: expected a known name, got 'cosin', did you mean 'cosine'?",
    ),
    option(
        "schedule-wants-more",
        "--lr-scheduler-type cosine_with_min_lr",
        "training.lr_scheduler_type: cosine_with_min_lr: One of min_lr or min_lr_rate should be set through the "
        "`lr_scheduler_kwargs` (training.extra.lr_scheduler_kwargs)",
    ),
    option(
        "optimizer",
        "--optim adamw_torc",
        "training.optim: expected a known name, got 'adamw_torc', did you mean 'adamw_torch'?",
    ),
    option("no-optimizer", "--optim zzz", "training.optim: expected one of adamw_torch, …; got 'zzz'"),
    option(
        "optimizer-not-installed",
        "--optim lomo",
        "training.optim: lomo: You need to install `lomo_optim` …",
        loads=True,
    ),
    option(
        "tracker",
        "--report-to tensorbord",
        "training.report_to: expected a known name, got 'tensorbord', did you mean 'tensorboard'?",
    ),
    option("wandb", "--report-to [tensorboard,wandb]", "training.report_to: wandb is not installed: pip install wandb"),
    option(
        "training-extra",
        "--training.extra.learning_rat 1",
        "training.extra.learning_rat: unknown key, did you mean 'training.learning_rate'?",
    ),
    option(
        "training-extra-far",
        "--training.extra.zzzzz 1",
        "training.extra.zzzzz: unknown key, and the trainer's arguments have none of this name",
    ),
    option("training-extra-of-ours", "--training.extra.seed 1", "training.extra.seed: expected training.seed instead"),
    option(
        "decided-elsewhere",
        "--training.extra.bf16 true",
        "training.extra.bf16: expected nothing, other settings decide it",
    ),
    option(
        "best-model", "--training.extra.load_best_model_at_end true", "training: --load_best_model_at_end requires …"
    ),
    option(
        "template",
        "--data chats.jsonl --chat-template chatlm",
        "data.chat_template: expected chatml, plain or a Jinja file, got 'chatlm', did you mean 'chatml'?",
        **CHATS,
    ),
    option(
        "template-without-chats",
        "--chat-template nonsense",
        "data.chat_template: expected null for data without chats, got 'nonsense'",
    ),
    option(
        "template-not-there",
        "--data chats.jsonl --chat-template my.jinja",
        "data.chat_template: expected chatml, plain or a Jinja file, got 'my.jinja'",
        **CHATS,
    ),
    option(
        "template-no-text",
        "--data chats.jsonl --chat-template my.jinja",
        "data.chat_template: expected chatml, plain or a Jinja file, got my.jinja, which is no text in UTF-8",
        my__jinja=b"\xff",
        **CHATS,
    ),
    option(
        "template-no-jinja",
        "--data chats.jsonl --chat-template my.jinja",
        "data.chat_template: not valid Jinja: Expected an expression, got 'end of statement block' in line 2",
        my__jinja="\n{% for x in %}",
        **CHATS,
    ),
]


@pytest.mark.parametrize("case", CONFIGURATION + MODELS + ADAPTERS + TRAINING, ids=lambda case: case.id)
def test_one_line_says_what_is_wrong(
    case: Wrong,
    tmp_path: Path,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case.check(tmp_path, checkpoints, capsys, monkeypatch)
