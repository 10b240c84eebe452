"""Each of the fused kernels of PyTorch's `scaled_dot_product_attention` by itself; it takes the first that serves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import attention_sdpa, attn_mask_of, sdpa_refusal
from .request import Request


class SdpaKernel:
    """`library.attention_sdpa` held to one kernel: exact where PyTorch's own is and this kernel takes the call."""

    beyond_sdpa = False

    def __init__(self, name: str, backend: str, can_use: str) -> None:
        """
        Args:
            name: of the candidate.
            backend: of torch.nn.attention.SDPBackend.
            can_use: the function of torch.backends.cuda that says whether the kernel takes a call.
        """
        self.name, self._backend, self._can_use = name, backend, can_use

    def absence(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"expected q on a GPU, got {device}"
        return None

    def version(self) -> str:
        return ""

    def refusal(self, request: Request) -> str | None:
        q, k, v, mask, scores = request[:5]
        if reason := sdpa_refusal(q, k, v, mask, scores, request.deterministic):
            return reason
        given = (attn_mask_of(mask, scores), scores.dropout, mask.right is not None, q.shape[1] != k.shape[1])
        params = torch.backends.cuda.SDPAParams(q, k, v, *given)
        if not getattr(torch.backends.cuda, self._can_use)(params):
            return f"expected sizes, dtypes and a device that PyTorch's {self._backend} takes"
        return None

    def run(self, request: Request) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self._backend)):
            return attention_sdpa(*request[:5])


SDPA_KERNELS = (
    SdpaKernel("cudnn", "CUDNN_ATTENTION", "can_use_cudnn_attention"),
    SdpaKernel("flash", "FLASH_ATTENTION", "can_use_flash_attention"),
    SdpaKernel("efficient", "EFFICIENT_ATTENTION", "can_use_efficient_attention"),
)
