"""Choices between implementations that compute the same: measured on this machine where they were, else analytic.

`choosing` is what ops ask; it never measures. `measuring` measures, when `fastpeft_kernels.tuner` is asked to.
"""
