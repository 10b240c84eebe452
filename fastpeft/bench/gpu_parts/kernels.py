"""Every kernel, configuration and dtype against plain PyTorch and the fp64 oracle."""

from fastpeft.bench.recorder import Recorder

order = 10
time_limit_s = 900
parallel = True


def run(recorder: Recorder, depth: str) -> None:
    from fastpeft_kernels.activation import gpu as activation
    from fastpeft_kernels.experts import gpu as experts
    from fastpeft_kernels.lora import gpu as lora
    from fastpeft_kernels.mlp import gpu as mlp
    from fastpeft_kernels.quant import gpu as quant

    families = {"quant": quant, "activation": activation, "lora": lora, "mlp": mlp, "experts": experts}
    recorder.run_suites({op: family.checks() for op, family in families.items()})
