"""The quickstart from beginning to end. This process computes nothing: it starts workers and shows what they find."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fastpeft.errors import UserError
from fastpeft.integrations.versions import check_versions
from fastpeft.requirements import require

from ..progress import stage
from . import curves
from .outcome import Outcome, Run
from .processes import WorkerError, run_generation, run_worker
from .settings import Settings

SHIPPED_PROMPT = "An object is"
PROMPT_WORDS = 8
GENERATED_TOKENS = 50
LINE_WIDTH = 100
"""Where output goes to a file or a pipe."""


class DivergedError(RuntimeError):
    """A fine-tuning whose loss is no number any more."""


def run(settings: Settings, console: Console | None = None) -> bool:
    """Verify, fine-tune twice, compare, reload.

    Args:
        settings: see Settings.
        console: where it shows; standard output by default.

    Returns:
        Whether everything agreed and the held-out perplexity fell.

    Raises:
        UserError: something asked for cannot be, or a package is missing.
    """
    console = console or _console()
    _check_packages()
    output = _fresh(Path(settings.output))
    try:
        outcome = _measure(settings, console)
        curves.plot(outcome.plain.losses, outcome.fast.losses, outcome.agreement, outcome.case, output / "loss.png")
        (output / "report.json").write_text(json.dumps(outcome.report(), indent=1, allow_nan=False) + "\n")
        _show(outcome, console)
        without_fastpeft = _reload(settings, outcome, console)
    except (WorkerError, DivergedError) as error:
        print(f"fastpeft: {error}", file=sys.stderr)
        return False
    for what, name in (("loss curves", "loss.png"), ("all figures", "report.json"), ("adapter", "adapter/")):
        _print(console, f"{what:12} {output / name}")
    return outcome.passed and without_fastpeft


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=LINE_WIDTH)


def _check_packages() -> None:
    problem = check_versions()
    if problem:
        raise UserError(problem)
    try:
        require("train", "matplotlib", "the loss curve")
    except ImportError as error:
        raise UserError(str(error)) from error


def _fresh(output: Path) -> Path:
    """The output folder, without what an earlier quickstart left in it."""
    try:
        (output / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: expected a folder that can be written, got {output}: {error}") from error
    for name in ("loss.png", "report.json"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "adapter", ignore_errors=True)
    return output


def _measure(settings: Settings, console: Console) -> Outcome:
    with stage(console, "verify") as listener:
        verified = run_worker("verify", settings, listener)
    # Module names run long: cut them where they would break the table's lines.
    table = verified["table"].replace("base_model.model.", "")
    console.print(table, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")
    _print(console, f"\n{_introduction(settings, verified)}\n")
    with stage(console, "plain PEFT", settings.steps) as listener:
        plain = Run.from_dict(run_worker("plain", settings, listener))
    with stage(console, "fastpeft", settings.steps) as listener:
        fast = Run.from_dict(run_worker("accelerated", settings, listener))
    for name, found in (("plain PEFT", plain), ("fastpeft", fast)):
        if found.diverged:
            raise DivergedError(f"{name}: {found.diverged}; try a lower --learning-rate")
    agreement = curves.compare(plain.losses, fast.losses, verified["dtype"])
    return Outcome(settings, plain, fast, agreement, verified)


def _introduction(settings: Settings, verified: dict[str, Any]) -> str:
    million = verified["parameters"] / 1e6
    tokens = settings.batch_size * settings.sequence_length
    return (
        f"Fine-tuning a model of {million:.1f}M parameters ({settings.quantization}, computing in {verified['dtype']}; "
        f"{verified['trainable']:,} trainable) on {verified['blocks']} blocks of {settings.sequence_length} tokens: "
        f"{settings.steps} steps of {tokens} tokens, twice. "
        f"{verified['accelerated']}."
    )


def _show(outcome: Outcome, console: Console) -> None:
    console.print()
    console.print(outcome.table())
    agreement = outcome.agreement
    notes = [
        f"Peak memory: {outcome.plain.peak_method}. Kept for backward: what one forward makes and leaves alive.",
        f"Loss curves {'agree' if agreement.passed else 'DISAGREE'}: largest |difference| {agreement.largest:.2e} nats "
        f"(step {agreement.step}), {agreement.relative:.1e} of the loss; allowed {agreement.tolerance:.0e}.",
        _perplexity_note(outcome),
    ]
    if outcome.plain.disturbed or outcome.fast.disturbed:
        notes.append("Step times vary much: something else is running here. Run again before you believe the speeds.")
    if not outcome.verified["passed"]:
        notes.append("fastpeft verify FAILED: see its table above.")
    _print(console, "\n".join(notes) + "\n")


def _perplexity_note(outcome: Outcome) -> str:
    before, after = outcome.fast.perplexity_before, outcome.fast.perplexity_after
    change = 100 * (after / before - 1)
    if outcome.plain.improved and outcome.fast.improved:
        return f"Held-out perplexity fell by {-change:.0f}%, from {before:.2f} to {after:.2f}."
    return f"Held-out perplexity DID NOT FALL: {before:.2f} before, {after:.2f} after ({change:+.0f}%)."


def _reload(settings: Settings, outcome: Outcome, console: Console) -> bool:
    """Show what the saved adapter writes; whether that was plain peft alone."""
    prompt = SHIPPED_PROMPT
    if not settings.shipped_text:
        prompt = " ".join(Path(settings.held_out).read_text(encoding="utf-8").split()[:PROMPT_WORDS])
    request = {
        "model": settings.model,
        "adapter": str(Path(settings.output) / "adapter"),
        "dtype": outcome.verified["dtype"],
        "quantization": settings.quantization,
        "device": outcome.verified["environment"]["device_type"],
        "prompt": prompt,
        "tokens": GENERATED_TOKENS,
    }
    with stage(console, "generate") as listener:
        listener({"event": "status", "text": "loading the adapter with plain peft"})
        generated = run_generation(request, settings)
    how = "WITH fastpeft loaded" if generated["loaded_fastpeft"] else "by plain peft in a fresh process"
    _print(console, f"\nThe saved adapter, reloaded {how}, continues {prompt!r}:\n\n{_indented(generated['tuned'])}")
    _print(console, f"\nThe base model alone:\n\n{_indented(generated['base'])}\n")
    return not generated["loaded_fastpeft"]


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
