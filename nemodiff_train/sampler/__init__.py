"""The trained sampler: a small network that decides which positions of a block a denoise forward unmasks."""
