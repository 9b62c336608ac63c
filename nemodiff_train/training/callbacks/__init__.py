"""What runs beside the training step."""
