"""Embeddings and heads of which some tokens' rows are trained: forward makes no copy of the whole matrix."""

from .api import token_embedding, token_linear

__all__ = ["token_embedding", "token_linear"]
