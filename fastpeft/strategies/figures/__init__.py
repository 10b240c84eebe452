"""What a strategy measures of a trained model: one file for each kind of result, from rows to findings."""

from .figures import Figures

__all__ = ["Figures"]
