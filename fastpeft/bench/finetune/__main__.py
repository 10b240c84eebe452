"""The command line of the end-to-end benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastpeft.bench.records import RecordFile, environment

from .case import METHODS, WIDER, FinetuneCase
from .peers import all_peers, choose
from .processes import LeftOutError
from .running import Plan, measure
from .sizes import MODELS, SCALES
from .table import table

SUITE = "finetune"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of `Result`, or 2 where the case cannot be run at all."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if _has_gpu() else "cpu")
    try:
        case = FinetuneCase(
            model=options.model, method=options.method, device=device, rows=options.rows, tokens=options.tokens,
            rank=options.rank, steps=options.steps, warmup=min(options.warmup, options.steps - 1),
            scale=options.scale or ("full" if device == "cuda" else "small"), layers=options.layers,
            dtype=options.dtype or ("bfloat16" if device == "cuda" else "float32"),
            checkpointing=options.checkpointing, learning_rate=options.learning_rate, threads=options.threads,
        )  # fmt: skip
        peers = choose(options.peers)
        if options.shared_imports and device != "cpu":
            raise ValueError(f"--shared-imports: expected the device cpu, got {device}")
        logs = options.out.with_suffix(".logs")
        plan = Plan(options.rounds, options.step_rounds, options.limit, logs, options.shared_imports, options.together)
    except ValueError as error:
        parser.error(str(error))
    file = RecordFile(options.out, environment(device))
    try:
        result = measure(case, peers, plan, lambda **fields: file.add(suite=SUITE, **fields))
    except LeftOutError as error:
        print(f"{case.model}: {error}; more in {plan.logs / 'source.log'}", file=sys.stderr)
        return 2
    print(table(result))
    print(f"records: {options.out}; what the processes printed: {plan.logs}")
    return result.exit_code


def _has_gpu() -> bool:
    from fastpeft.bench.gpu import gpu_name

    return bool(gpu_name())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastpeft.bench.finetune",
        description="Fine-tune one model with plain PEFT, with others and with fastpeft, and compare.",
    )
    add = parser.add_argument
    add("--model", default="qwen3-0.6b", help=f"{', '.join(MODELS)} (random weights), a folder, or a name on the hub")
    add("--method", choices=METHODS, default="lora")
    add("--rows", type=int, default=4, help="of a batch")
    add("--tokens", type=int, default=1024, help="of each row")
    add("--rank", type=int, default=16)
    add("--steps", type=int, default=50, help="of a run")
    add("--warmup", type=int, default=5, help="steps whose time does not count")
    add("--learning-rate", type=float, default=2e-4)
    add("--checkpointing", action="store_true", help="recompute every layer in backward")
    add("--scale", choices=SCALES, help="of a model with random weights; full on a GPU, small on a CPU")
    add("--layers", type=int, help="of such a model, in place of its own number")
    add("--dtype", choices=WIDER, help="bfloat16 on a GPU, float32 on a CPU")
    add("--device", choices=("cuda", "cpu"))
    add("--threads", type=int, help="of torch, on a CPU")
    add("--peers", nargs="+", metavar="NAME", help=f"by default all: {', '.join(all_peers())}")
    add("--rounds", type=int, default=1, help="runs of each peer, in turn")
    add("--step-rounds", type=int, default=15, help="single steps of each peer, in turn with PEFT's; 0 for none")
    add("--limit", type=float, default=1800.0, metavar="S", help="seconds after which a peer's process is ended")
    add("--shared-imports", action="store_true", help="import libraries once (on a CPU): no times to the first step")
    add("--together", action="store_true", help="load all models at once, where they fit: no times to the first step")
    add("--out", type=Path, default=Path("runs/bench/finetune.jsonl"), help="records are appended to it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
