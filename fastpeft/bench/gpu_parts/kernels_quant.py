"""4-bit decode and packed weights against plain PyTorch and the fp64 oracle."""

from fastpeft.bench.recorder import Recorder

order = 10
time_limit_s = 600


def run(recorder: Recorder, depth: str) -> None:
    from fastpeft_kernels.quant.gpu import checks

    recorder.run_checks("quant", checks())
