"""How good and how fast a model decodes: tasks, records, metrics, likelihood."""
