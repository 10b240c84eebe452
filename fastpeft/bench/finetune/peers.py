"""Who fine-tunes: each in a process of its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from .case import FinetuneCase
from .sizes import CAUSAL

EXACT, PEFT, AGAIN = "peft exact", "peft", "peft again"
REQUIRED = (EXACT, PEFT, AGAIN)
"""What tells whether the others compute the same."""


@dataclass(frozen=True)
class Peer:
    """One way to run the same fine-tuning.

    Attributes:
        sft: by TRL's SFTTrainer, else by transformers' Trainer.
        without_metrics: by an SFTTrainer with Trainer's loss, as Unsloth's is: TRL's own waits for the GPU between
            forward and backward, for the entropy, the hits and the number of tokens.
        switches: the keywords of `fastpeft.accelerate`; None where it is not called.
        liger: with Trainer's `use_liger_kernel`.
        compiled: with Trainer's `torch_compile`.
        unsloth: by Unsloth's FastLanguageModel.
        exact: in the next wider dtype, for its losses alone.
        backwards: the rows of each batch in reverse order, which rounds otherwise and changes nothing else.
        moved: from trained parameters that are one rounding away, up or down by chance.
    """

    name: str
    sft: bool = False
    without_metrics: bool = False
    switches: tuple[tuple[str, bool], ...] | None = None
    liger: bool = False
    compiled: bool = False
    unsloth: bool = False
    exact: bool = False
    backwards: bool = False
    moved: bool = False

    @property
    def ours(self) -> bool:
        return self.switches is not None

    @property
    def other_roundings(self) -> tuple[Peer, ...]:
        """The same computation, rounded otherwise: how a run that is too far off is tried again."""
        return replace(self, backwards=not self.backwards), replace(self, moved=True)


def features() -> list[str]:
    """The keywords of `fastpeft.accelerate` that are on unless switched off."""
    import fastpeft

    parameters = inspect.signature(fastpeft.accelerate).parameters.values()
    return [each.name for each in parameters if each.default is True]


def all_peers() -> dict[str, Peer]:
    """By name, in the order in which they run."""
    found = [
        Peer(EXACT, exact=True),
        Peer(PEFT),
        Peer(AGAIN, backwards=True),
        Peer("fastpeft", switches=()),
        Peer("trl", sft=True),
        Peer("fastpeft + trl", sft=True, switches=()),
        Peer("fastpeft + trl without metrics", sft=True, without_metrics=True, switches=()),
        Peer("peft + liger", liger=True),
        Peer("torch.compile", compiled=True),
        Peer("unsloth", sft=True, unsloth=True),
        *(Peer(f"fastpeft without {name}", switches=((name, False),)) for name in features()),
    ]
    return {peer.name: peer for peer in found}


def why_not(peer: Peer, case: FinetuneCase, task: str) -> str | None:
    """Why it cannot run here, as far as that is to be known without importing it; None if it may."""
    needed = {"trl": peer.sft, "datasets": peer.sft, "liger_kernel": peer.liger, "unsloth": peer.unsloth}
    absent = [name for name, wanted in needed.items() if wanted and find_spec(name) is None]
    if absent:
        return f"{absent[0]} is not installed"
    if (peer.liger or peer.unsloth) and case.device != "cuda":
        return "needs a GPU"
    if (peer.sft or peer.liger) and task != CAUSAL:
        return "takes decoders only" if peer.sft else f"has no kernels for {task} models"
    return None


def choose(names: list[str] | None) -> list[Peer]:
    """Those of the given names, or all, and REQUIRED in any case.

    Raises:
        ValueError: no such peer.
    """
    known: dict[str, Any] = all_peers()
    for name in names or ():
        if name not in known:
            raise ValueError(f"peers: expected one of {', '.join(known)}; got {name!r}")
    return [peer for name, peer in known.items() if not names or name in names or name in REQUIRED]
