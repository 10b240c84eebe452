"""4-bit weights in bitsandbytes' format: encode and decode."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import triton_available
from ..common.shapes import empty_for, imitated
from ..common.tracing import as_op
from ..common.validation import check_floating, check_rows
from ..native import decode_4bit_refusal, native_library
from .choosing import default_backend
from .custom_op import decode_4bit_op, decode_4bit_out_op, decode_into
from .reference import encode_4bit_reference
from .scales import NESTED_BLOCKSIZE, encode_scales
from .storage import BLOCKSIZES, DTYPES, QUANT_TYPES, Packed4bit
from .tables import code_table

ENCODE_BACKENDS = ("auto", "torch", "triton")
DECODE_BACKENDS = (*ENCODE_BACKENDS, "native")
_OUT_DTYPES = (*DTYPES, torch.float64)


def encode_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False, backend: str = "auto"
) -> Packed4bit:
    """Quantises a matrix to 4 bits an element, blockwise.

    Equivalent PyTorch, but for ties and for what `reference` notes, with blocks over weight.flatten():
    `absmax = block.abs().amax()` and `nibble = (block / absmax - code[:, None]).abs().argmin(0)`.

    Args:
        weight: (N, K) in fp32, fp16 or bf16, any strides. Must be finite: a NaN makes its whole block NaN.
        quant_type: "nf4" (quantiles of the normal distribution) or "fp4" (1 sign, 2 exponent, 1 mantissa bit).
        blocksize: elements that share a scale: 32, 64, ... or 4096.
        nested: quantise the fp32 scales to 8 bits too, 256 of them to a block.
        backend: "torch", "triton" (CUDA only), or "auto": triton on CUDA where it is installed. All give the same bits.

    Returns:
        the storage, with dtype `weight.dtype`, on the weight's device; it shares no memory with `weight`.

    Raises:
        TypeError: `weight` is not a tensor of those dtypes.
        ValueError: any other argument is not as above.
        ImportError: backend "triton" without Triton.

    Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a tensor in one of {DTYPES}, got {got}")
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected (out_features, in_features), got shape {tuple(weight.shape)}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: expected one of {QUANT_TYPES}, got {quant_type!r}")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize!r}")
    _check_backend(backend, ENCODE_BACKENDS)
    if default_backend(weight.device) == "triton" if backend == "auto" else backend == "triton":
        from .forward import encode_4bit_triton

        packed, absmax = encode_4bit_triton(weight, quant_type, blocksize)
    else:
        packed, absmax = encode_4bit_reference(weight, quant_type, blocksize)
    code = code_table(quant_type, weight.device)
    shape = (weight.shape[0], weight.shape[1])
    if not nested:
        return Packed4bit(packed, absmax, code, blocksize, shape, weight.dtype, quant_type)
    scales = encode_scales(absmax)
    return Packed4bit(
        packed,
        scales.absmax,
        code,
        blocksize,
        shape,
        weight.dtype,
        quant_type,
        scales.nested_absmax,
        scales.nested_code,
        scales.nested_offset,
        NESTED_BLOCKSIZE,
    )


def decode_4bit(
    packed: Packed4bit,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The values of a 4-bit weight, or of a range of its rows, as a dense matrix.

    Equivalent PyTorch, with `scale` as `Packed4bit` defines it, here for all rows:
    `nibbles = torch.stack([packed.packed >> 4, packed.packed & 15], 1).flatten()[: N * K].long()` and
    `(packed.code[nibbles] * scale.repeat_interleave(packed.blocksize)[: N * K]).to(dtype).view(N, K)`.

    Deterministic, without gradients, the same bits on every backend. Traces under torch.compile(fullgraph=True).

    Args:
        packed: a weight of shape (N, K).
        out: (last - first, K) on the weight's device, fp64, fp32, fp16 or bf16, any strides; filled and returned.
        rows: half-open range (first, last), 0 <= first <= last <= N; all rows when None.
        dtype: dtype of the result when `out` is None; `packed.dtype` by default.
        backend: "torch", "triton" (CUDA only), "native" (C++ on CPU, on torch's number of threads; to fp32, fp16 or
            bf16, into columns of stride 1), or "auto": what `fastpeft tune` found to be fastest here, else triton on
            CUDA where it is installed, native on CPU where there is a compiler and it can serve, torch otherwise.

    Returns:
        `out`, or a new contiguous tensor (last - first, K).

    Raises:
        TypeError: `packed` is not a Packed4bit, or `out` or `dtype` not of those dtypes.
        ValueError: `rows` outside the weight; `out` of another shape or device, with elements that share memory, or
            requiring a gradient; a backend that cannot serve these arguments.
        ImportError: backend "triton" without Triton, or "native" where the C++ library cannot be built.

    Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
    """
    if not isinstance(packed, Packed4bit):
        raise TypeError(f"packed: expected a Packed4bit, got {type(packed).__name__}")
    first, last = check_rows(rows, packed.shape[0])
    if out is None:
        dtype = packed.dtype if dtype is None else dtype
        if dtype not in _OUT_DTYPES:
            raise TypeError(f"dtype: expected one of {_OUT_DTYPES}, got {dtype}")
    else:
        _check_out(out, (last - first, packed.shape[1]), packed.device)
    if backend == "native":
        _check_native(packed, packed.dtype if dtype is None else dtype, out)
    _check_backend(backend, DECODE_BACKENDS)
    if as_op():
        weight = (
            packed.tensors,
            packed.shape,
            packed.blocksize,
            packed.nested_blocksize or 0,
            packed.quant_type,
            first,
            last,
        )
        if out is None:
            return decode_4bit_op(*weight, dtype, backend)
        decode_4bit_out_op(*weight, out, backend)
        return out
    if out is None:
        assert dtype is not None
        out = empty_for("decoded weights", (last - first, packed.shape[1]), dtype, packed.device)
    return out if imitated(out.device) else decode_into(packed, out, first, last, backend)


def _check_backend(backend: str, backends: tuple[str, ...]) -> None:
    if backend not in backends:
        raise ValueError(f"backend: expected one of {backends}, got {backend!r}")
    if backend == "triton" and not triton_available():
        raise ImportError("backend: 'triton' was asked for, but Triton is not installed")


def _check_native(packed: Packed4bit, dtype: torch.dtype, out: Tensor | None) -> None:
    """Refuse what was asked of the C++ library and would fall to PyTorch."""
    if wrong := decode_4bit_refusal(packed, dtype if out is None else out.dtype, out):
        raise ValueError(f"backend: {wrong}")
    if not torch.compiler.is_compiling() and native_library() is None:
        raise ImportError("backend: 'native' was asked for, but the C++ library cannot be built here")


def _check_out(out: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(out, Tensor) or out.dtype not in _OUT_DTYPES:
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"out: expected a tensor in one of {_OUT_DTYPES}, got {got}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected shape {shape}, got {tuple(out.shape)}")
    if out.device != device:
        raise ValueError(f"out: expected a tensor on {device}, got {out.device}")
    if out.requires_grad:
        raise ValueError("out: expected a tensor that requires no gradient, got one that does")
    strides = out.stride()
    if 0 in strides and any(size > 1 and stride == 0 for size, stride in zip(out.shape, strides, strict=True)):
        raise ValueError(f"out: expected elements of their own, got an expanded tensor with strides {strides}")
