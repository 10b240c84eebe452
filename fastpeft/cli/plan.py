"""`fastpeft plan`."""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from fastpeft.errors import UserError

from .generate import TrustRemoteCode
from .shared import Quiet, Verbose, settle_logs, uncollected

if TYPE_CHECKING:
    from fastpeft.memory.plan.planning import Plan
    from fastpeft.memory.plan.predicting import Setting

EPILOG = """
Examples:

  fastpeft plan meta-llama/Llama-3.1-8B --gpu-memory 24GiB --seq 8192

  fastpeft plan llama-3.1-8b --gpu-memory 16GiB --gpu-memory 24GiB --seq 4096 --json

  fastpeft plan llama-3.1-70b --gpu-memory 16GiB --host-memory 16GiB --seq 4096 --disk-bandwidth 3GB

  fastpeft plan Qwen/Qwen2.5-VL-7B-Instruct --gpu-memory 24GiB --seq 4096 --images 2 --image-size 720x1280

  fastpeft plan llama-3.1-70b --gpu-memory 80GiB --seq 4096 --gpus 8 --gpus 64 --network 50GB
"""


class Method(str, Enum):
    """How the frozen weights are kept, or that there are none."""

    lora = "lora"
    qlora = "qlora"
    full = "full"


class PlanDtype(str, Enum):
    """What a GPU computes with."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub ID with a config.json, or llama-3.1-8b etc.")
    ],
    gpu_memory: Annotated[list[str], typer.Option(help="Such as 24GiB or 24GB; may come again, for a table.")],
    seq: Annotated[int, typer.Option(min=1, help="Tokens a row.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 1,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Pinned memory that may be used; weights beyond it wait on the disk.", show_default=False),
    ] = None,
    disk_bandwidth: Annotated[str, typer.Option(help="Bytes a second that are read from the disk, for those.")] = "2GB",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_DIR",
            help="PEFT's adapter_config.json, in place of --rank and --target-modules.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="qlora: nested NF4. full: all weights are trained.")] = Method.qlora,
    target_modules: Annotated[str, typer.Option(help="What the adapter is put on.")] = "all-linear",
    dtype: Annotated[PlanDtype, typer.Option(help="What is computed with.")] = PlanDtype.bfloat16,
    optimizer: Annotated[str, typer.Option(help="As training.optim.")] = "adamw_torch",
    accumulation: Annotated[
        int | None,
        typer.Option(min=1, help="As gradient_accumulation_steps; left out: more than 1.", show_default=False),
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, help="Pictures of each row, whose tokens are among --seq, for a model that sees.")
    ] = 0,
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Of each, such as 448 or HEIGHTxWIDTH; left out: the model's, else 1024.", show_default=False
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of each recording, for a model that hears; left out: 30.", show_default=False)
    ] = None,
    task: Annotated[str, typer.Option(help="auto: what the configuration says.")] = "auto",
    gpus: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Also what so many send, computed; may come again.", show_default=False),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a machine, for --gpus.")] = 8,
    gpu_link: Annotated[str, typer.Option(help="Bytes a second from GPU to GPU in a machine, for --gpus.")] = "450GB",
    network: Annotated[str, typer.Option(help="The same between machines, for each GPU, for --gpus.")] = "50GB",
    largest: Annotated[bool, typer.Option(help="Find the largest context and batch.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plans as JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Predict the memory of a training from a configuration, and choose what each layer keeps so that it fits.

    No weights are read and no GPU is needed. Exits with 1 if nothing fits one of the GPUs, and says what would.
    """
    with uncollected():
        from fastpeft.memory.plan.adapter import read_adapter
        from fastpeft.memory.plan.media import parse_image_size
        from fastpeft.memory.plan.planning import model_of, plan_on
        from fastpeft.memory.plan.several import Fabric, render, scaling
        from fastpeft.memory.plan.timing import Rates
        from fastpeft.memory.sizes import parse_size

        settle_logs(verbose, quiet, rows=False)
        try:
            sizes = [parse_size(each, "--gpu-memory") for each in gpu_memory]
            host = None if host_memory is None else parse_size(host_memory, "--host-memory")
            rates = Rates(disk=parse_size(disk_bandwidth, "--disk-bandwidth"))
            fabric = Fabric(gpus_per_node, parse_size(gpu_link, "--gpu-link"), parse_size(network, "--network"))
            name, found = model_of(
                model, seq, batch, rank, method.value, target_modules, dtype.value, optimizer, task,
                trust_remote_code, accumulation, images, parse_image_size(image_size), seconds,
                None if adapter is None else read_adapter(adapter),
            )  # fmt: skip
            spreads = scaling(found, gpus or (), fabric=fabric)
        except ValueError as error:
            raise UserError(str(error)) from error
        plans = [plan_on(name, found, size, host, None, largest, rates) for size in sizes]
    if as_json:
        several = {"spread": [each.to_dict() for each in spreads]} if spreads else {}
        print(json.dumps({"plans": [each.to_dict() for each in plans], **several}, indent=1))
    elif len(plans) == 1:
        print(plans[0])
    else:
        _print_table(plans, found.setting)
    if spreads and not as_json:
        print(f"\nseveral GPUs, a step of {seq * batch} tokens on each, computed and not measured:\n{render(spreads)}")
    if not all(each.fits for each in plans):
        raise typer.Exit(1)


def _print_table(plans: list[Plan], setting: Setting) -> None:
    """A row for each GPU memory."""
    from fastpeft.memory.plan.largest import beyond
    from fastpeft.memory.plan.rendering import policy_text
    from fastpeft.memory.sizes import gib

    print(f"{'GPU memory':>10}{'predicted':>14}{'fits':>6}{'time':>7}{'longest':>10}  policy")
    for each in plans:
        fits = "yes" if each.fits else "no"
        figures = f"{gib(each.gpu_memory):>10}{gib(each.need.total):>14}{fits:>6}{each.need.slowdown:>7.2f}"
        figures += f"{'' if each.most_sequence is None else each.most_sequence:>10}"
        disk = f"; {gib(each.need.disk)} of weights on the disk" if each.need.disk else ""
        print(f"{figures}  {policy_text(each.policy.layers)}{disk}")
    for note in beyond(setting):
        print(f"note: {note}")
