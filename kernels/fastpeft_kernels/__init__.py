"""The ops of fastpeft: Triton kernels with PyTorch references. Knows nothing of models, PEFT or transformers."""

__version__ = "0.1.0"
