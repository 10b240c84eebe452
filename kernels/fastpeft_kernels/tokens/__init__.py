"""Embeddings and heads of which some tokens' rows are trained: no copy of the whole matrix is made."""

from .api import token_embedding, token_linear

__all__ = ["token_embedding", "token_linear"]
