"""Gated activations against plain PyTorch and the fp64 oracle."""

from fastpeft.bench.recorder import Recorder

order = 15
time_limit_s = 600


def run(recorder: Recorder, depth: str) -> None:
    from fastpeft_kernels.activation.gpu import checks

    recorder.run_checks("activation", checks())
