"""The choices of `fastpeft tune` for layers of well-known sizes: winners in tuned/, to be shipped as defaults, and the
steps that they make beside those of the analytic defaults."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from fastpeft.bench.recorder import Recorder

order = 20
time_limit_s = 480
needs = ("peft",)

SIZES = {  # one layer of each; Mistral 7B is as Llama 3.1 8B
    "Llama 3.2 1B": {"hidden_size": 2048, "intermediate_size": 8192, "heads": (32, 8)},
    "Llama 3.1 8B": {"hidden_size": 4096, "intermediate_size": 14336, "heads": (32, 8)},
    "Qwen2.5 7B": {"hidden_size": 3584, "intermediate_size": 18944, "heads": (28, 4)},
}
SMALL = {"a small Llama": {"hidden_size": 64, "intermediate_size": 128, "heads": (2, 1)}}
TOKENS = {"quick": [4096], "default": [1024, 4096], "full": [512, 1024, 2048, 4096, 8192, 16384]}


def run(recorder: Recorder, depth: str) -> None:
    _run(recorder, SIZES, TOKENS[depth], seconds=0.2 if depth == "quick" else 0.5)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, SMALL, [16], seconds=0.0)


def _run(recorder: Recorder, sizes: dict[str, dict[str, Any]], tokens: list[int], seconds: float) -> None:
    methods = ["lora", "qlora"] if importlib.util.find_spec("bitsandbytes") else ["lora"]
    recorder.run_checks("tuning", _checks(recorder, sizes, methods, tokens, seconds))
    recorder.run_checks("tuning", _masked_checks(recorder, max(tokens), seconds))
    _use_winners(recorder)
    recorder.run_checks("tuning", _steps(recorder, sizes, methods, max(tokens), 1 if seconds == 0.0 else 15))


def _use_winners(recorder: Recorder) -> None:
    """Those too that this run found before it was resumed."""
    from fastpeft_kernels.tuning import choosing, files
    from fastpeft_kernels.tuning.records import UnusableError

    device = choosing.with_index(_device(recorder))
    name = choosing.device_name(device)
    with suppress(UnusableError):  # of other versions; this run has measured nothing then
        for winner in files.read(files.file_of(name, recorder.file.path.parent / "tuned"), name):
            choosing.learn(device, winner)


def _checks(
    recorder: Recorder, sizes: dict[str, dict[str, Any]], methods: list[str], tokens: list[int], seconds: float
) -> Iterator[Any]:
    for name, size in sizes.items():
        for method in methods:
            yield f"{name} {method}", partial(_tune, recorder, size, method, tokens, seconds)


def _masked_checks(recorder: Recorder, tokens: int, seconds: float) -> Iterator[Any]:
    """Attention that PyTorch's own cannot do, as Llama's, Mistral's, Gemma 2's and gpt-oss's layers ask for it."""
    asked: dict[str, dict[str, Any]] = {
        "padding or documents": {"intervals": True},
        "padding with holes": {"right": 1, "marks": True},
        "window": {"left": 1024, "right": 1},
        "soft cap": {"right": 1, "softcap": True},
        "window and sinks": {"left": 128, "right": 1, "sinks": True},
    }
    for name, parts in asked.items():
        yield f"attention, {name}", partial(_tune_masked, recorder, parts, tokens, seconds)


def _tune_masked(recorder: Recorder, parts: dict[str, Any], tokens: int, seconds: float) -> dict[str, float]:
    from fastpeft_kernels import tuner
    from fastpeft_kernels.attention.keys import MASKED, MaskedKey

    dtype = "bfloat16" if recorder.device == "cuda" else "float32"
    bounds = {"left": -1, "right": -1, "intervals": False, "marks": False, "softcap": False, "sinks": False}
    sizes = (1, 32, 8, tokens, tokens, 128, 128) if recorder.device == "cuda" else (1, 2, 1, tokens, tokens, 16, 16)
    key = MaskedKey(*sizes, **{**bounds, **parts}, gradients=True, dtype=dtype)
    return _measure(recorder, tuner.cases_for([(MASKED, key)], _device(recorder), [tokens]), seconds)


def _steps(
    recorder: Recorder, sizes: dict[str, dict[str, Any]], methods: list[str], tokens: int, rounds: int
) -> Iterator[Any]:
    for name, size in sizes.items():
        for method in methods:
            yield f"step {name} {method}", partial(_step, recorder, name, size, method, tokens, rounds)


def _step(
    recorder: Recorder, name: str, size: dict[str, Any], method: str, tokens: int, rounds: int
) -> dict[str, float]:
    """Two layers forward and backward with what was measured, and without."""
    import torch

    import fastpeft
    from fastpeft.bench.steps import StepCase, adapt, make_batch
    from fastpeft.bench.timer import interleaved, ratio
    from fastpeft_kernels.tuning.choosing import use_tuned

    dtype = torch.bfloat16 if recorder.device == "cuda" else torch.float32
    case = StepCase("llama", method, dtype, layers=2, rows=2, tokens=tokens // 2, autocast=dtype == torch.bfloat16)
    with torch.device(recorder.device):
        base = _layer(**size, layers=2)
    model: Any = fastpeft.accelerate(adapt(base, case, recorder.device))
    batch = make_batch(case, recorder.device)

    def step(tuned: bool) -> None:
        use_tuned(tuned)
        with torch.autocast(recorder.device, torch.bfloat16, enabled=case.autocast):
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    steps = {"tuned": partial(step, True), "untuned": partial(step, False)}
    try:
        samples = interleaved(steps, rounds, device=recorder.device)
    finally:
        use_tuned(True)
    for peer, times in samples.items():
        settings = {"model": name, "tokens": tokens}
        recorder.add(
            case=f"step {name} {method}", op="tuning", peer=peer, metric="step time", unit="ms", samples=times,
            settings=settings,
        )  # fmt: skip
    return {"tuned_to_untuned": ratio(samples, "tuned", "untuned")}


def _tune(recorder: Recorder, size: dict[str, Any], method: str, tokens: list[int], seconds: float) -> dict[str, float]:
    import torch

    import fastpeft
    from fastpeft.bench.steps import StepCase, adapt
    from fastpeft.tuning import cases_of

    device = _device(recorder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:  # random numbers are drawn faster on a GPU
        base = _layer(**size)
    model = fastpeft.accelerate(adapt(base, StepCase("llama", method, dtype), str(device)))
    del base
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):  # as Trainer's bf16
        cases = cases_of(model, tokens)
    del model
    return _measure(recorder, cases, seconds)


def _device(recorder: Recorder) -> Any:
    import torch

    return torch.device(recorder.device, 0) if recorder.device == "cuda" else torch.device("cpu")


def _measure(recorder: Recorder, cases: list[Any], seconds: float) -> dict[str, float]:
    """Times of every candidate of the cases; the winners go to tuned/."""
    from fastpeft_kernels import tuner

    device = _device(recorder)
    folder = recorder.file.path.parent / "tuned"
    outcomes = tuner.tune(cases, device, folder=folder, again=True, seconds=seconds)
    wrong = []
    for outcome in outcomes:
        for candidate, us in outcome.winner.us.items() if outcome.winner else ():
            case = str(outcome.key)
            recorder.add(case=case, op=outcome.op, peer=candidate, metric="time", unit="us", samples=us)
        wrong += [f"{outcome.op} {outcome.key}, {name}: {why}" for name, why in outcome.dropped.items()]
    print("\n".join(wrong))
    others = [o for o in outcomes if o.winner is not None and o.winner.choice != o.library]
    return {"cases": len(outcomes), "not_the_library": len(others), "dropped": len(wrong)}


def _layer(hidden_size: int, intermediate_size: int, heads: tuple[int, int], layers: int = 1) -> Any:
    """A Llama of few layers and words, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=heads[0], num_key_value_heads=heads[1], vocab_size=1000)
    )
