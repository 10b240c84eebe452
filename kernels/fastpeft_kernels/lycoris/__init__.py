"""Updates of full rank made of small factors: LoHa's product of two low-rank matrices, LoKr's Kronecker product."""

from .api import LohaAdapter, LokrAdapter, loha_linear, lokr_linear

__all__ = ["LohaAdapter", "LokrAdapter", "loha_linear", "lokr_linear"]
