"""Recipes: every public function returns the complete configuration of a run, and is started by its name."""
