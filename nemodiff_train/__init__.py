"""Turn a pretrained autoregressive language model into a tri-mode one on Megatron."""

__version__ = "0.1.0"
