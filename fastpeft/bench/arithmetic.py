"""What LoRA adds to the frozen products of a decoder layer, on paper: operations, bytes, and the time that follows.

python -m fastpeft.bench.arithmetic

Bytes are those that pass between kernels beside the frozen products' own: each kernel reads its operands and writes its
result once; matrices of rank width, adapters and attention are left out, and the sum of siblings' dX, which the frozen
layer makes too. No launch costs anything here. So this is a floor for each way, to hold a measurement against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reader:
    """Projections of one input of `inputs` features."""

    inputs: int
    outputs: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.outputs)

    @property
    def count(self) -> int:
        return len(self.outputs)


LLAMA_8B = (
    Reader(4096, (4096, 1024, 1024)),
    Reader(4096, (4096,)),
    Reader(4096, (14336, 14336)),
    Reader(14336, (4096,)),
)
TOKENS, BYTES, FLOPS, BANDWIDTH = 8192, 2, 700e12, 4e12

Elements = Callable[[Reader, int], tuple[float, float]]
"""(forward, backward) that a way moves for one reader and so many tokens."""


def peft(of: Reader, tokens: int) -> tuple[float, float]:
    """x read for each A; the update written, scaled and added; dY scaled; dY read for dB and dS; dX added."""
    x, y = tokens * of.inputs, tokens * of.total
    return of.count * x + 6 * y, 4 * y + 5 * of.count * x


def rival(of: Reader, tokens: int) -> tuple[float, float]:
    """x read for each A, the update added by the product; in backward S once more, x for dA and S, dX read again."""
    x, y = tokens * of.inputs, tokens * of.total
    return of.count * x + 2 * y, 2 * y + 4 * of.count * x


def library(of: Reader, tokens: int) -> tuple[float, float]:
    """x read once; each output read and written once more; dY read for dS and for dB; dS A added to dX; x for dA."""
    x, y = tokens * of.inputs, tokens * of.total
    return x + 2 * y, 2 * y + 3 * x


def kernels(of: Reader, tokens: int) -> tuple[float, float]:
    """x read once; the update in the frozen product's accumulator; dY read once for dS and dB; x for dA."""
    x, y = tokens * of.inputs, tokens * of.total
    return x, y + x


WAYS: dict[str, Elements] = {
    "PEFT": peft,
    "Unsloth's addmm form": rival,
    "fastpeft, library": library,
    "fastpeft, our kernels": kernels,
}


def layer_table(layer: tuple[Reader, ...] = LLAMA_8B, tokens: int = TOKENS, ranks: tuple[int, ...] = (16, 64)) -> str:
    """A Markdown table, one row a way."""
    weights = sum(reader.inputs * reader.total for reader in layer)
    frozen = 4 * tokens * weights / FLOPS
    rows = [
        "| | extra bytes, forward | backward | " + " | ".join(f"time / frozen, r = {rank}" for rank in ranks) + " |",
        "|---" * (3 + len(ranks)) + "|",
    ]
    for name, way in WAYS.items():
        forward, backward = (BYTES * sum(part) for part in zip(*(way(r, tokens) for r in layer), strict=True))
        times = []
        for rank in ranks:
            products = 6 * tokens * rank * sum(r.count * r.inputs + r.total for r in layer)
            times.append((frozen + products / FLOPS + (forward + backward) / BANDWIDTH) / frozen)
        rows.append(
            f"| {name} | {forward / 1e9:.1f} GB | {backward / 1e9:.1f} GB | "
            + " | ".join(f"{time:.2f}" for time in times) + " |"
        )  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    """Print the table."""
    print(layer_table())


if __name__ == "__main__":
    main()
