"""How many bytes an optimizer keeps between steps."""

from __future__ import annotations

OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "fastpeft_adamw",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "sgd",
)
_LEAST_8BIT, _BLOCK, _LEAST_PAGED = 4096, 256, 100_000
"""Of bitsandbytes 0.50: elements from which on state has 8 bits, that share a scale, and from which on it is paged."""


def state_sizes(optimizer: str, elements: int, device: str = "cuda", itemsize: int = 4) -> list[int]:
    """Bytes of each tensor of state that a parameter has on the device; counts of steps are left out.

    What is paged may lie on the device as well, but makes room.

    Args:
        optimizer: one of `OPTIMIZERS`, as `training.optim`.
        elements: of the parameter.
        device: "cuda" or "cpu", where nothing is paged.
        itemsize: bytes of an element of the parameter, in whose dtype torch's optimizers and ours keep state.
    """
    if optimizer == "sgd":
        return []
    if "8bit" in optimizer and elements >= _LEAST_8BIT:
        values, scales = [elements] * 2, [-(-elements // _BLOCK) * 4] * 2
    else:
        values, scales = [(4 if "32bit" in optimizer or "8bit" in optimizer else itemsize) * elements] * 2, []
    paged = optimizer.startswith("paged") and elements >= _LEAST_PAGED and device == "cuda"
    return scales if paged else values + scales
