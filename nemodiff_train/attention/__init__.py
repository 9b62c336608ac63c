"""Attention for training on doubled sequences and for decoding with a cache."""
