"""Fine-tuning from end to end: the trainers that users run, with plain PEFT, with others and with fastpeft.

python -m fastpeft.bench.finetune --model qwen3-0.6b --scale small

- `case`, `sizes`, `peers`: what is run, on which model, by whom.
- `processes`: a process for each peer, which may crash or hang.
- `worker`, `loading`, `rows`, `loop`: what happens in it.
- `agreement`, `flops`: which runs count, and how much work they do.
- `running`, `result`, `keeping`, `table`: all of them in order, kept as records and shown.
"""
