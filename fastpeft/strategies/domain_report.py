"""What a domain-adaptive run's report says of its texts and of what was forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from fastpeft.data.cleaning import Removed
from fastpeft.data.mixing import Mix
from fastpeft.metrics.findings import Section
from fastpeft.metrics.language import Losses

REASONS = {
    "duplicates": "that came before",
    "overlap": "that share 13 words in a row with a text that is measured on",
    "general overlap": "of general text that do so",
}


@dataclass(frozen=True)
class Cleaned:
    """What was done to texts before they were encoded.

    Attributes:
        removed: by reason.
        new_tokens: how many the vocabulary got.
        saved: by how much they shorten the texts, as a share of their tokens.
    """

    removed: dict[str, Removed]
    new_tokens: int = 0
    saved: float = 0.0


def data_section(cleaned: Cleaned) -> Section | None:
    """What was taken out, and the new tokens; None for neither."""
    lines = [
        f"- {found.removed:,} of {found.units:,} texts (paragraphs of documents) were taken out {REASONS[reason]}."
        for reason, found in cleaned.removed.items()
    ]
    if cleaned.new_tokens:
        lines.append(f"- The vocabulary has {cleaned.new_tokens:,} new tokens: texts take {cleaned.saved:.1%} fewer.")
    return Section("Texts", "\n".join(lines)) if lines else None


def forgetting_section(before: dict[str, Losses], after: dict[str, Losses], mix: Mix) -> Section | None:
    """Losses on held-out text of either kind; None where nothing was held out."""
    if not after:
        return None
    lines = [
        "| held-out text | nats a token before | after | difference (95 % interval) |",
        "|---|---|---|---|",
    ]
    for name, now in after.items():
        old, change = before[name], now.since(before[name])
        lines.append(
            f"| {name} ({len(now)} rows, {int(now.tokens.sum()):,} tokens) | {old.loss().value:.4f} | "
            f"{now.loss().value:.4f} | {change.value:+.4f} ({change.low:+.4f} to {change.high:+.4f}) |"
        )
    lines += ["", "A row is compared with itself; the interval is over rows. Masks and spans are the same in both.", ""]
    if "general" not in after:
        lines.append("No general text was given, so what was forgotten is not known.")
    else:
        change = after["general"].since(before["general"])
        verdict = "is worse" if change.low > 0 else "is better" if change.high < 0 else "may be worse or better"
        replayed = (
            f"Replayed general text is {mix.share:.1%} of the training tokens ({mix.general_rows:,} of "
            f"{len(mix.encoded):,} rows); a run with replay 0 would show what that saved."
        )
        lines.append(
            f"On general text the model {verdict} than before. "
            + (replayed if mix.general_rows else "No general text was replayed.")
        )
    return Section("Forgetting", "\n".join(lines))
