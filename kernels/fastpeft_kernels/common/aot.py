"""Compiling kernels ahead of time, for GPUs that need not be present, and reading what the assembler says of them.

Every op family with Triton kernels has a module `aot` with a function `cases()` that yields AotCase. Rules:

- shared memory within the target's limit, in every configuration;
- no register spills in default configurations;
- on sm_90, the PTX of a matrix kernel holds `wgmma`.

On sm_75 (no bf16) a bf16 case is compiled with fp16 in its place. Matrix kernels are skipped there: Triton has no
tensor core path for it, so that matrix work takes the library instead.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from .device import ptxas_path

# Largest shared memory of one block, in bytes, after opting in (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED_LIMITS = {
    75: 65536,
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}
TARGETS = tuple(SHARED_LIMITS)
_WITHOUT_BF16 = 75


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration.

    Attributes:
        name: unique within its family; says kernel, dtype and configuration.
        kernel: the `triton.jit` function; decorators around it (autotune, heuristics) are looked through.
        signature: argument name to Triton type: "*bf16", "i32", "fp32". Pointers are taken to be aligned to 16 bytes,
            as torch allocates them, unless written "*bf16:1"; integers to be multiples of 16 if written "i32:16".
        constexprs: argument name to value: constexpr arguments, optional pointers that are None, integers that are 1.
        num_warps, num_stages: launch options.
        maxnreg: likewise: most registers a thread, None for no limit.
        default: whether it is a configuration that is used without tuning.
        matrix: whether it multiplies matrices, so that it must use wgmma on sm_90.
        targets: compute capabilities that it is meant for; all of them when None.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    default: bool = True
    matrix: bool = False
    targets: tuple[int, ...] | None = None
    maxnreg: int | None = None


@dataclass
class AotResult:
    """What became of one case on one target. `problems` is empty when it keeps the rules; sizes are in bytes."""

    family: str
    case: str
    target: int
    default: bool
    skipped: str = ""
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    wgmma: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def families() -> list[str]:
    """Names of the subpackages of fastpeft_kernels that have an `aot` module."""
    package = import_module(__package__.rpartition(".")[0])
    names = [info.name for info in iter_modules(package.__path__) if info.ispkg and info.name != "common"]
    return [name for name in names if find_spec(f"{package.__name__}.{name}.aot")]


def collect() -> dict[str, list[AotCase]]:
    """All cases of all op families.

    Raises:
        ValueError: two cases of a family share a name.
    """
    root = __package__.rpartition(".")[0]
    found = {family: list(import_module(f"{root}.{family}.aot").cases()) for family in families()}
    for family, cases in found.items():
        names = [case.name for case in cases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"cases of {family}: expected unique names, got {', '.join(twice)} more than once")
    return found


def select(targets: tuple[int, ...], default_only: bool) -> Iterator[tuple[str, AotCase, int]]:
    """(family, case, target) for every compilation asked for."""
    for family, cases in collect().items():
        for case in cases:
            if case.default or not default_only:
                yield from ((family, case, target) for target in targets)


def signature_of(kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str], other: str) -> dict[str, str]:
    """Types of the arguments that are not constants: those given, and `other` for the rest."""
    return {name: types.get(name, other) for name in kernel.arg_names if name not in constants}


def compile_case(family: str, case: AotCase, target: int) -> AotResult:
    """Compile `case` for sm_`target`, assemble it, and hold it to the rules.

    Raises:
        ValueError: `target` is not one of TARGETS, or the case does not fit its kernel.
        RuntimeError: Triton has no assembler for NVIDIA GPUs here.
    """
    if target not in SHARED_LIMITS:
        raise ValueError(f"target: expected one of {', '.join(map(str, TARGETS))}, got {target}")
    result = AotResult(family, case.name, target, case.default, skipped=_reason_to_skip(case, target))
    if result.skipped:
        return result
    source = _source(case, target)
    start = time.perf_counter()
    try:
        compiled = _compile(source, case, target)
    except Exception as error:  # whatever Triton raises is a finding about the kernel
        result.problems.append(f"does not compile: {_in_short(error)}")
        return result
    result.shared = compiled.metadata.shared
    result.wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
    _assemble(compiled.asm["ptx"], target, result)
    result.seconds = time.perf_counter() - start
    result.problems += _broken_rules(case, result)
    return result


def _reason_to_skip(case: AotCase, target: int) -> str:
    if case.targets is not None and target not in case.targets:
        return "not meant for this target"
    if case.matrix and target == _WITHOUT_BF16:
        return "matrix work takes the library here"
    return ""


def _source(case: AotCase, target: int) -> Any:
    from triton.compiler import ASTSource

    kernel = _innermost(case.kernel)
    types, constants = dict(case.signature), dict(case.constexprs)
    _check_arguments(case, kernel.arg_names)
    if target == _WITHOUT_BF16:
        types = {name: kind.replace("bf16", "fp16") for name, kind in types.items()}
        constants = {name: _without_bf16(value) for name, value in constants.items()}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name in types and _is_aligned(types[name])]
    return ASTSource(
        fn=kernel,
        signature={name: types[name].partition(":")[0] if name in types else "constexpr" for name in kernel.arg_names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def _compile(source: Any, case: AotCase, target: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    from .launching import ALWAYS

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg, **ALWAYS}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _innermost(kernel: Any) -> Any:
    while not hasattr(kernel, "arg_names") or hasattr(kernel.fn, "arg_names"):
        kernel = kernel.fn
    return kernel


def _check_arguments(case: AotCase, names: list[str]) -> None:
    given = [*case.signature, *case.constexprs]
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    twice = [name for name in case.signature if name in case.constexprs]
    for what, wrong in (("has no", missing), ("has an unknown", unknown), ("has twice the", twice)):
        if wrong:
            raise ValueError(f"case {case.name!r} {what} argument {', '.join(wrong)}; expected {', '.join(names)}")


def _is_aligned(kind: str) -> bool:
    base, _, hint = kind.partition(":")
    if hint not in ("", "1", "16"):
        raise ValueError(f"signature: expected a type with hint :1, :16 or none, got {kind!r}")
    return hint == "16" or (base.startswith("*") and hint == "")


def _without_bf16(value: Any) -> Any:
    import triton.language as tl

    return tl.float16 if value == tl.bfloat16 else value


def _assemble(ptx: str, target: int, result: AotResult) -> None:
    """Assemble as Triton does, with -v: that is where registers and spills are said."""
    path = ptxas_path(target)
    if path is None:
        raise RuntimeError("Triton has no ptxas here; ahead-of-time checks need its NVIDIA backend")
    architecture = f"sm_{target}{'a' if target >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [path, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={architecture}", str(source)]
        done = subprocess.run([*command, "-o", str(source.with_suffix(".cubin"))], capture_output=True, text=True)
    if done.returncode != 0:
        result.problems.append(f"does not assemble: {done.stderr.strip()}")
        return
    for name, pattern in {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
    }.items():
        numbers = re.findall(pattern, done.stderr)
        if not numbers:
            raise RuntimeError(f"ptxas -v: expected text like {pattern!r}, got {done.stderr.strip()!r}")
        setattr(result, name, max(map(int, numbers)))


def _broken_rules(case: AotCase, result: AotResult) -> list[str]:
    limit = SHARED_LIMITS[result.target]
    broken = []
    if result.shared > limit:
        broken.append(f"shared memory {result.shared} is over the limit of {limit}")
    if case.default and result.spill_stores + result.spill_loads > 0:
        broken.append(f"spills {result.spill_stores} + {result.spill_loads} bytes in a default configuration")
    if case.matrix and result.target == 90 and not result.wgmma:
        broken.append("a matrix kernel without wgmma")
    return broken


def _in_short(error: Exception) -> str:
    """Triton's messages begin with a place, quote source, and end with the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(dict.fromkeys([*lines[:1], *lines[-1:]]))}"
