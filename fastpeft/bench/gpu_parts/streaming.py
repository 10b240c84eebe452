"""Streamed layers beside resident ones: the same bits, time of a step and of its copies, peak memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastpeft.bench.recorder import Recorder

order = 56
time_limit_s = 300
needs = ("peft", "bitsandbytes")

CASES = tuple(f"{base}, {how}" for base in ("NF4", "dense") for how in ("recompute", "keep", "offload"))
LAYERS, RING = 6, 2


def run(recorder: Recorder, depth: str, small: bool = False) -> None:
    checks = [(name, partial(_case, recorder, name, depth, small)) for name in CASES]
    recorder.run_checks("streaming", [*checks, ("host memory", partial(_host, recorder.device, small))])


dry_run = partial(run, small=True)


def _case(recorder: Recorder, name: str, depth: str, small: bool) -> dict[str, float]:
    import torch

    import fastpeft
    from fastpeft.bench.memory import peak_of_step
    from fastpeft.bench.timer import interleaved, ratio
    from fastpeft.memory.plan.transfer import Transfer

    base, how = name.split(", ")
    device = recorder.device
    tokens = 32 if small else 8192
    resident, streamed = (_model(base, small, device) for _ in range(2))
    ids = torch.randint(3, 500, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    fastpeft.accelerate(resident, memory=fastpeft.LayerPolicy(how))  # type: ignore[arg-type]
    policy = fastpeft.LayerPolicy(how, streamed=True)  # type: ignore[arg-type]
    fastpeft.accelerate(streamed, memory=fastpeft.MemoryPolicy(policy, ring=RING))
    for model in (resident, streamed):
        _step(model, ids)  # finds the siblings
    ring = next(m.fastpeft_ring for m in streamed.modules() if hasattr(m, "fastpeft_ring"))
    wanted, *again = (_step(resident, ids) for _ in range(4))
    for _ in range(3):  # a copy that comes too late is wrong in some of them
        for i, (mine, one) in enumerate(zip(_step(streamed, ids), wanted, strict=True)):
            apart = max((one - other[i]).abs().max().item() for other in again)
            error = (mine - one).abs().max().item()
            assert error <= 4 * apart, f"{tuple(mine.shape)} differs by {error:.2e}, a resident step by {apart:.2e}"
    largest = max(bundle.nbytes for bundle in ring.bundles)
    assert ring.peak <= RING * largest, f"{ring.peak} bytes in {RING} places of {largest}"
    steps = {"streamed": partial(_step, streamed, ids), "resident": partial(_step, resident, ids)}
    rounds = 2 if small else {"quick": 4, "default": 8, "full": 20}[depth]
    samples = interleaved(steps, rounds, device=device)
    for peer, taken in samples.items():
        recorder.add(case=name, op="streaming", peer=peer, metric="step time", unit="ms", samples=taken)
    figures = {"time_ratio": ratio(samples, "streamed", "resident"), "layer_mib": largest / 2**20}
    if device != "cuda":
        return figures
    link = _link(ring)
    figures["link_gb_per_s"] = link / 1e9
    elements = sum(m.in_features * m.out_features for m in ring.bundles[0].layer.modules() if hasattr(m, "base_layer"))
    calculated = Transfer(tokens, elements, largest, link, 400e12, how != "keep")
    figures["calculated_hidden_share"] = calculated.hidden
    taken_here = {peer: peak_of_step(step) for peer, step in steps.items()}
    ring.empty()
    taken_here["streamed, from an empty ring"] = peak_of_step(steps["streamed"])
    allowed = taken_here["resident"] + RING * largest * 1.1 + 64 * 2**20
    assert taken_here["streamed, from an empty ring"] <= allowed, (
        f"{taken_here} bytes, {RING} layers are {RING * largest}"
    )
    return figures | {
        f"peak_{peer.replace(', ', '_').replace(' ', '_')}_mib": b / 2**20 for peer, b in taken_here.items()
    }


def _host(device: str, small: bool) -> dict[str, float]:
    """A model moved to the GPU after it was streamed on the CPU: nothing but its small parts goes there; then back."""
    import torch

    import fastpeft
    from fastpeft.memory.streaming.host_store import is_pinned

    model = _model("NF4", small, "cpu", RING + 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastpeft.accelerate(model, memory=fastpeft.LayerPolicy("recompute", streamed=True))
    free = torch.cuda.memory_allocated() if device == "cuda" else 0
    model.to(device)
    bundles = [m.fastpeft_bundle for m in model.modules() if hasattr(m, "fastpeft_bundle")]
    assert all(not bundle.filled and bundle.device.type == torch.device(device).type for bundle in bundles)
    assert device != "cuda" or all(is_pinned(stowed.host) for bundle in bundles for stowed in bundle.stowed)
    taken = torch.cuda.memory_allocated() - free if device == "cuda" else 0
    _step(model, torch.randint(3, 500, (1, 32)).to(device))
    assert all(torch.equal(value.cpu(), before[name]) for name, value in model.state_dict().items())
    fastpeft.restore(model)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in model.state_dict().items())
    return {"moved_mib": taken / 2**20, "streamed_mib": sum(bundle.nbytes for bundle in bundles) / 2**20}


def _link(ring: Any) -> float:
    """Bytes a second of the copies of all layers, one after the other."""
    import torch

    ring.empty()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for bundle in ring.bundles:
        ring.use(bundle)
    ring.empty()
    end.record()
    torch.cuda.synchronize()
    copied = sum(bundle.nbytes for bundle in ring.bundles)
    return float(copied / (begin.elapsed_time(end) / 1e3))


def _step(model: Any, ids: Any) -> list[Any]:
    """Loss and gradients."""
    import torch

    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def _model(base: str, small: bool, device: str, layers: int = LAYERS) -> Any:
    """A Llama whose layers are those of an 8B model, with LoRA on all of them and dropout."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastpeft.bench.bases import NF4, quantise

    torch.manual_seed(0)
    hidden, mlp = (64, 128) if small else (4096, 14336)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=hidden // 32 if small else 32, num_key_value_heads=2 if small else 8,
        max_position_embeddings=16384,
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" and small else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    if base == NF4:
        paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
        quantise(model, NF4, paths)
    adapted = get_peft_model(
        model, LoraConfig(r=16, target_modules=list(names), lora_dropout=0.1, init_lora_weights=False)
    )
    return adapted.to(device).train()
