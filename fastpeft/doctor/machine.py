"""The facts that several checks judge: what nvidia-smi, the driver and torch say of the GPUs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from . import system
from .findings import attempt, in_short
from .system import Smi, SmiGpu, Version

TORCH_LIMIT_S = 120.0  # the first import from a cold network file system


@dataclass(frozen=True)
class TorchGpu:
    """A GPU as torch sees it.

    Attributes:
        capability: 10 * major + minor; None if it is not NVIDIA's.
        total_bytes, free_bytes: memory; None where even torch could not start on it.
        uuid: its identity, as nvidia-smi has it too.
    """

    index: int
    name: str
    capability: int | None
    total_bytes: int
    free_bytes: int | None
    uuid: str = ""


@dataclass(frozen=True)
class Torch:
    """What torch says of itself.

    Attributes:
        version: empty when it cannot be imported, `error` says why then.
        cuda, hip: what it was built for; both None in a CPU build.
        complaint: what it said instead of showing GPUs.
        architectures: what its kernels are compiled for: "sm_90", "compute_90".
    """

    version: str = ""
    error: str = ""
    cuda: str | None = None
    hip: str | None = None
    complaint: str = ""
    gpus: tuple[TorchGpu, ...] = ()
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Facts, as injected by tests or asked by `look`."""

    smi: Smi = field(default_factory=Smi)
    torch: Torch = field(default_factory=Torch)
    driver_cuda: Version | None = None
    device_node: bool = False
    on_bus: bool = False

    @property
    def has_gpu(self) -> bool:
        """Whether this system has a GPU to offer, usable as it is or not."""
        return bool(self.smi.gpus or self.torch.gpus or self.smi.hangs or self.device_node)

    @property
    def device(self) -> str:
        """Where small things are tried out."""
        return "cuda" if self.torch.gpus else "cpu"

    def smi_gpu(self, gpu: TorchGpu) -> SmiGpu | None:
        """nvidia-smi's view of one of torch's GPUs. The two count differently, so the identity decides."""
        same = [found for found in self.smi.gpus if found.uuid and found.uuid == gpu.uuid]
        alone = self.smi.gpus if len(self.smi.gpus) == len(self.torch.gpus) == 1 else ()
        return next(iter([*same, *alone]), None)


def look() -> Machine:
    """Ask this machine; takes torch's import and at most some 20 s more. Never raises."""
    smi = system.nvidia_smi()
    try:
        torch = attempt(look_at_torch, TORCH_LIMIT_S)
    except TimeoutError:
        torch = Torch(error=f"importing torch and asking it for GPUs hangs: no answer in {TORCH_LIMIT_S:g} s")
    cuda = system.driver_cuda() or (system.smi_cuda() if smi.gpus else None)
    return Machine(smi, torch, cuda, system.has_device_node(), system.nvidia_on_bus())


def look_at_torch() -> Torch:
    """Import torch and ask it for GPUs. Never raises."""
    try:
        import torch
    except Exception as error:
        return Torch(error=in_short(error))
    gpus: list[TorchGpu] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        complaint = ""
        try:
            if torch.cuda.is_available():
                gpus += [_gpu(index) for index in range(torch.cuda.device_count())]
        except Exception as error:
            complaint = in_short(error)
    complaint = complaint or " ".join(in_short(str(warning.message)) for warning in said)
    return Torch(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        complaint=complaint,
        gpus=tuple(gpus),
        architectures=tuple(torch.cuda.get_arch_list()),
    )


def _gpu(index: int) -> TorchGpu:
    import torch

    from fastpeft_kernels.common.device import device_capability

    about = torch.cuda.get_device_properties(index)
    try:
        free: int | None = torch.cuda.mem_get_info(index)[0]
    except RuntimeError:  # too full even for torch to start on it
        free = None
    capability = device_capability(f"cuda:{index}")
    return TorchGpu(index, about.name, capability, about.total_memory, free, str(getattr(about, "uuid", "")))
