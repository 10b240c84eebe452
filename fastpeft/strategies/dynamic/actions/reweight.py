"""Weight each token's loss by the model's own probability of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from .base import Action, Run

if TYPE_CHECKING:
    from ..losses import Tokens


@dataclass(frozen=True)
class ReweightOptions:
    """Of a rule with action "reweight".

    Attributes:
        signal: what a token's loss is multiplied with.
        anchor: factor of the divergence KL(starting model || model), added to the loss of each token.
        start: steps with the plain loss before.
    """

    signal: Literal["probability"] = "probability"
    anchor: float = 0.0
    start: int = 0


class Reweight(Action):
    """DFT, and with an anchor what ASFT adds. The starting model is the base without its adapter.

    The anchor is the divergence of the whole vocabulary at each learned token, averaged over the starting model's
    probabilities, the direction in which the authors of ASFT compute it too: what that model finds likely has to stay
    so, where DFT alone lets it go.

    Source: On the Generalization of SFT, Wu et al. 2025, arXiv:2508.05629; Anchored Supervised
    Fine-Tuning, Zhu et al. 2025, arXiv:2509.23753, and its authors' code, zhuchichi56/ASFT on GitHub.
    """

    name: ClassVar[str] = "reweight"
    Options: ClassVar[type] = ReweightOptions
    weighs: ClassVar[bool] = True
    options: ReweightOptions
    _on = False

    def check(self, config: FastpeftConfig) -> None:
        self.at_least(anchor=0, start=0)
        if self.options.anchor and config.lora.init_lora_weights not in (True, "gaussian"):
            raise UserError(
                f"{self.key}.anchor: expected lora.init_lora_weights true or gaussian, with which training starts from "
                f"the base, got {config.lora.init_lora_weights}"
            )

    def resume(self, run: Run) -> None:
        self._on = run.step >= self.options.start

    def act(self, run: Run) -> None:
        if run.step == self.options.start:
            self._on = True
            anchored = f", anchored with {self.options.anchor:g}" if self.options.anchor else ""
            self.decide(run, "probability", None, f"tokens weighted{anchored}", f"from step {run.step} on")

    @property
    def anchor(self) -> float:
        """Factor of the divergence at the moment."""
        return self.options.anchor if self._on else 0.0

    def weights(self, tokens: Tokens) -> Any:
        return (-tokens.nll.detach()).exp() if self._on else None
