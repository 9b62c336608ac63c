"""Evaluation of accuracy and decoding speed: tasks, records, metrics, likelihood."""
