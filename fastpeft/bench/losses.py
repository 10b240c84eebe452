"""The loss of hidden states under a head, without logits, beside plain PyTorch and TRL's chunked function, on a CPU.

python -m fastpeft.bench.losses --rounds 5 --out runs/bench/losses.jsonl

Writes one JSON Lines file of records; `python -m fastpeft.bench.tables --as losses` makes the table of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .left_out import NotHereError
from .memory import PeakMemory
from .ops import loss_peers
from .records import RecordFile, environment
from .timer import interleaved, ratio

SUITE = "losses"
TOLERANCE = 1e-4  # relative, of the loss and in norm of the gradient of the hidden states


class LossCase(NamedTuple):
    """Sizes in fp32, and whether the head is trained too."""

    tokens: int
    features: int
    words: int
    trained: bool

    @property
    def name(self) -> str:
        return f"{self.tokens} x {self.features}, {self.words} words, {'trained' if self.trained else 'frozen'} head"


CASES = tuple(
    LossCase(*sizes, trained)
    for sizes, heads in (
        ((1024, 288, 32_000), (False, True)),
        ((512, 576, 49_152), (False, True)),
        ((256, 2048, 65_536), (False, True)),
    )
    for trained in heads
)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers() -> dict[str, Loss]:
    """Those that can be imported here."""
    found: dict[str, Loss] = {"fastpeft": _fastpeft, "plain": _plain}
    try:
        log_probs = loss_peers.trl_log_probs()
    except NotHereError:
        return found
    return found | {"trl": lambda *tensors: -log_probs(*tensors).mean()}


def _fastpeft(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_peers.fastpeft(hidden, weight, labels)[0]


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss_peers.plain(hidden, weight, labels)[0]


def measure(case: LossCase, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of forward and backward in every round, and MiB at the most, by peer, which must agree."""
    torch.manual_seed(0)
    hidden = torch.randn(case.tokens, case.features, requires_grad=True)
    weight = (torch.randn(case.words, case.features) * case.features**-0.5).requires_grad_(case.trained)
    labels = torch.randint(0, case.words, (case.tokens,))
    wanted = [hidden, weight] if case.trained else [hidden]

    def step(loss: Loss) -> tuple[Tensor, Tensor]:
        value = loss(hidden, weight, labels)
        return value.detach(), torch.autograd.grad(value, wanted)[0]

    steps = {name: partial(step, loss) for name, loss in peers().items()}
    exact = steps["plain"]()
    peaks = {}
    for name, run in steps.items():
        for mine, theirs in zip(run(), exact, strict=True):
            error = ((mine - theirs).norm() / theirs.norm()).item()
            if not error <= TOLERANCE:
                raise AssertionError(f"{case.name}: {name} deviates by {error:.1e}, over {TOLERANCE:.0e}")
        with PeakMemory(torch.device("cpu")) as peak:
            run()
        peaks[name] = peak.mib
    return interleaved(steps, rounds, warmup=0), peaks  # each ran twice by now


def main(arguments: Sequence[str] | None = None, cases: Sequence[LossCase] = CASES) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.losses", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/bench/losses.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.unlink(missing_ok=True)
    file = RecordFile(options.out, environment("cpu"))
    settings = {"threads": options.threads}
    for case in cases:
        samples, peaks = measure(case, options.rounds)
        common = {"suite": SUITE, "case": case.name, "op": "linear_cross_entropy", "settings": settings}
        for peer in samples:
            file.add(**common, peer=peer, metric="step time", unit="ms", samples=samples[peer])
            file.add(**common, peer=peer, metric="peak memory", unit="MiB", samples=peaks[peer])
        others = (peer for peer in samples if peer != "fastpeft")
        ratios = ", ".join(f"{ratio(samples, 'fastpeft', peer):.2f} of {peer}" for peer in others)
        most = ", ".join(f"{peer} {mib:.0f}" for peer, mib in peaks.items())
        print(f"{case.name:48} {ratios}; MiB {most}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
