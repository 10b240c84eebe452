"""LoRA projections against plain PyTorch and the fp64 oracle."""

from fastpeft.bench.recorder import Recorder

order = 20
time_limit_s = 600


def run(recorder: Recorder, depth: str) -> None:
    from fastpeft_kernels.lora.gpu import checks

    recorder.run_checks("lora", checks())
