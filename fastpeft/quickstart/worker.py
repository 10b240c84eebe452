"""One task of a quickstart, in a process of its own: `python -m fastpeft.quickstart.worker TASK SETTINGS RESULT`.

Tasks: `verify`, `plain`, `accelerated`. The result is a JSON file.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.errors import UserError

from .channel import Channel
from .settings import Settings

if TYPE_CHECKING:
    from .loading import Loaded

VERIFY_ROWS, VERIFY_TOKENS = 2, 64


def verify(settings: Settings, channel: Channel) -> dict[str, Any]:
    """fastpeft.verify on the loaded model, with real text; also what the machine is."""
    import torch

    import fastpeft
    from fastpeft.bench.records import environment
    from fastpeft.models.devices import autocast

    loaded = _load(settings, channel)
    device, dtype, model, blocks = loaded.device, loaded.dtype, loaded.model, loaded.blocks
    fastpeft.accelerate(model)
    channel.status("verifying")
    rows = torch.stack([block["input_ids"][:VERIFY_TOKENS] for block in blocks[:VERIFY_ROWS]]).to(device)
    with autocast(device, dtype):
        verification = fastpeft.verify(model, {"input_ids": rows, "labels": rows})
    return {
        "passed": verification.passed,
        "table": str(verification),
        "accelerated": str(fastpeft.report(model)).splitlines()[0],
        "architecture": type(model.get_base_model()).__name__,
        "parameters": sum(_elements(p) for p in model.get_base_model().parameters() if not p.requires_grad),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "blocks": len(blocks),
        "dtype": str(dtype).removeprefix("torch."),
        "environment": asdict(environment(device.type)),
    }


def plain(settings: Settings, channel: Channel) -> dict[str, Any]:
    """Fine-tuning with PEFT as it is."""
    from . import loading

    return _fine_tune(settings, channel, loading.forbid_cpu_packing)


def accelerated(settings: Settings, channel: Channel) -> dict[str, Any]:
    """The same after fastpeft.accelerate; saves the adapter."""
    import fastpeft

    return _fine_tune(settings, channel, fastpeft.accelerate, Path(settings.output) / "adapter")


def _fine_tune(
    settings: Settings, channel: Channel, prepare: Callable[[Any], Any], adapter: Path | None = None
) -> dict[str, Any]:
    from .training import fine_tune

    loaded = _load(settings, channel)
    prepare(loaded.model)
    training = fine_tune(loaded, settings, channel)
    if adapter is not None:
        loaded.model.save_pretrained(adapter)
    return asdict(training)


def _load(settings: Settings, channel: Channel) -> Loaded:
    from fastpeft.models.devices import pick_device, pick_dtype

    from . import loading
    from .packing import both_texts

    channel.status("loading the model")
    blocks, held_out = both_texts(loading.load_tokenizer(settings), settings)  # first: it may be too short
    device = pick_device()
    dtype = pick_dtype(settings.dtype, device, "--dtype")
    model = loading.attach_adapter(loading.load_base(settings, device, dtype), settings)
    return loading.Loaded(device, dtype, model, blocks, held_out)


def _elements(parameter: Any) -> int:
    """Elements of a parameter; two a byte where it is packed."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


TASKS: dict[str, Callable[[Settings, Channel], dict[str, Any]]] = {
    "verify": verify,
    "plain": plain,
    "accelerated": accelerated,
}


def main() -> int:
    """Exit code 2 when the user asked for something that cannot be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the whole process group; the parent says so
    warnings.simplefilter("ignore", FutureWarning)
    task, settings_file, result_file = sys.argv[1:]
    channel = Channel()
    try:
        result = TASKS[task](Settings.load(Path(settings_file)), channel)
    except UserError as error:
        channel.user_error(str(error))
        return 2
    Path(result_file).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
