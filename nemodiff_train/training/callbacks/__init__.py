"""Callbacks of the training loop, one per file; :mod:`nemodiff_train.training.run` orders them."""
