"""Training steps of fastpeft beside plain PEFT (and bitsandbytes) on whole small models, verified first."""

from __future__ import annotations

import importlib.util

from fastpeft.bench.recorder import Recorder

order = 60
time_limit_s = 480


def run(recorder: Recorder, depth: str) -> None:
    _run(recorder, depth, small=False)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, depth, small=True)


def _run(recorder: Recorder, depth: str, small: bool) -> None:
    if importlib.util.find_spec("peft") is None:
        print("peft is not installed: no whole model was stepped")
        return
    methods = ["lora", "qlora"] if importlib.util.find_spec("bitsandbytes") else ["lora"]
    if "qlora" not in methods:
        print("bitsandbytes is not installed: no 4-bit model was stepped")
    recorder.run_checks("lora", ((f"{case.name}", lambda case=case: _case(recorder, case, depth)) for case in _cases(methods, small)))


def _cases(methods, small):  # type: ignore[no-untyped-def]
    import torch

    from fastpeft.bench.steps import StepCase

    size = {"hidden": 64, "layers": 2, "tokens": 16} if small else {"hidden": 2048, "layers": 4, "rows": 4, "tokens": 1024}
    for family in ("llama", "bert", "t5"):
        for method in methods:
            yield StepCase(family, method, torch.bfloat16, **size)
        yield StepCase(family, "lora", torch.bfloat16, **size, autocast=True, dropout=0.05)
        yield StepCase(family, "lora", torch.float32, **size, autocast=True, checkpointing=True)


def _case(recorder, case, depth):  # type: ignore[no-untyped-def]
    import torch

    import fastpeft
    from fastpeft.bench.steps import build, make_batch, measure
    from fastpeft.bench.timer import ratio

    model = fastpeft.accelerate(build(case, recorder.device))
    with torch.autocast(recorder.device, torch.bfloat16, enabled=case.autocast):
        verified = fastpeft.verify(model, make_batch(case, recorder.device))
    assert verified.passed, str(verified)
    rounds = 2 if recorder.device == "cpu" else {"quick": 5, "default": 15, "full": 40}[depth]
    result = measure(case, rounds, recorder.device)
    for peer, samples in result.samples.items():
        recorder.add(case=case.name, op="lora", peer=peer, metric="step time", unit="ms", samples=samples)
    for peer, kept in result.kept.items():
        recorder.add(case=case.name, op="lora", peer=peer, metric="kept for backward", unit="MiB", samples=kept / 2**20)
    return {"time_ratio": ratio(result.samples, "fastpeft", "peft"), "kept_ratio": result.kept["fastpeft"] / result.kept["peft"]}
