"""Products in 8-bit floating point (e4m3) with a scale for each row of both operands."""

from .api import Fp8Rows, fp8_refusal, quantise_rows, scaled_product, unfit_shape

__all__ = ["Fp8Rows", "fp8_refusal", "quantise_rows", "scaled_product", "unfit_shape"]
