"""Settings of few-shot fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpeft.errors import UserError

MethodName = Literal["contrastive", "classifier", "pattern", "t-few", "reptile", "fomaml"]


@dataclass(frozen=True)
class FewShotOptions:
    """Of `strategy.options`.

    Attributes:
        method: how it is learned; see methods.METHODS.
        shots: rows a class that are trained on (K).
        seeds: how many draws of rows are trained and measured, from training.seed on; the first one's adapter is kept.
        measured_rows: rows that are measured on, at most.
        near_threshold: rows this much like one that is measured on are not drawn; Jaccard similarity of runs of words.
        baselines: measure what needs no training too.
        pairs: contrastive: pairs of each kind, alike and not, that begin with each text.
        pattern: text with the slots {text} and {answer}; {text_pair} where rows have one.
        verbaliser: what stands for each class in {answer}; null: the classes' names.
        calibrate: subtract what the model gives for a pattern without text (Zhao et al. 2021).
        demonstrations: rows shown in the prompts of the in-context baselines, at most; 0 for no such baseline.
        adapter: pattern and t-few: LoRA, or (IA)³, which scales keys, values and feed-forward; null: (IA)³ for t-few.
        novel: reptile and fomaml: classes that are adapted to; no row of theirs is trained on before.
        ways: classes of a training episode; null: as many as novel ones.
        queries: rows a class that an episode's adaptation is judged by.
        inner_steps: of an adaptation.
        inner_rate: its learning rate.
    """

    method: MethodName = "contrastive"
    shots: int = 8
    seeds: int = 1
    measured_rows: int = 1000
    near_threshold: float = 0.8
    baselines: bool = True
    pairs: int = 10
    pattern: str = "{text} It was {answer}."
    verbaliser: dict[str, str] | None = None
    calibrate: bool = False
    demonstrations: int = 4
    adapter: Literal["lora", "ia3"] | None = None
    novel: list[str] | None = None
    ways: int | None = None
    queries: int = 4
    inner_steps: int = 5
    inner_rate: float = 0.01

    def check(self) -> None:
        """Raises UserError for what no data could make right."""
        least = {"shots": 1, "seeds": 1, "measured_rows": 1, "pairs": 1, "demonstrations": 0, "queries": 1}
        for name, low in (least | {"inner_steps": 1}).items():
            if (value := getattr(self, name)) < low:
                raise UserError(f"strategy.options.{name}: expected at least {low}, got {value}")
        if not 0 < self.near_threshold <= 1:
            raise UserError(f"strategy.options.near_threshold: expected above 0 to 1, got {self.near_threshold}")
        if not self.inner_rate > 0:
            raise UserError(f"strategy.options.inner_rate: expected more than 0, got {self.inner_rate}")
        if self.novel is not None and self.method not in ("reptile", "fomaml"):
            raise UserError(f"strategy.options.novel: expected null for method {self.method}, got {self.novel}")
        if self.ways is not None and self.ways < 2:
            raise UserError(f"strategy.options.ways: expected at least 2, got {self.ways}")
