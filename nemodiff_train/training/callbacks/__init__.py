"""What runs beside the training step, one callback per file; :mod:`nemodiff_train.training.run` orders them."""
