"""The whole job on a small model, offline."""
