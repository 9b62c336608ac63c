"""Decoding: one session over the model's weights and cache, and one file per mode."""
