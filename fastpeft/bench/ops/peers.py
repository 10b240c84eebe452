"""Peers that ops have in common."""

from __future__ import annotations

import torch

from ..left_out import NotHereError
from .case import Forward, Inputs, Peer


def compiled(reference: Peer) -> Peer:
    """The same by torch.compile as it comes, for fixed sizes; a graph that breaks is an error."""

    def make(inputs: Inputs) -> Forward:
        return torch.compile(reference(inputs), fullgraph=True, dynamic=False)  # type: ignore[no-any-return]

    return make


def on_gpu(peer: Peer) -> Peer:
    """The same, where there is a GPU."""

    def make(inputs: Inputs) -> Forward:
        if not any(tensor.is_cuda for tensor in inputs.tensors.values()):
            raise NotHereError("needs a GPU")
        return peer(inputs)

    return make
