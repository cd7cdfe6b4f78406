"""Mixed-precision quantization of PyTorch models under a hard cost budget."""

__version__ = "0.1.0"
