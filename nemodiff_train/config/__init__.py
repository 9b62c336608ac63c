"""The configuration of a run, its defaults, and the recipes that return it."""
