"""The whole MLP against plain PyTorch and the fp64 oracle."""

from fastpeft.bench.recorder import Recorder

order = 25
time_limit_s = 480


def run(recorder: Recorder, depth: str) -> None:
    from fastpeft_kernels.mlp.gpu import checks

    recorder.run_checks("mlp", checks())
