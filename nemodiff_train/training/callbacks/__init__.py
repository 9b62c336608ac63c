"""What runs beside the training step, one callback per file; :mod:`.order` lists them."""
