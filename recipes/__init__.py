"""One readable page a recipe; each defines ``recipe(...)`` and returns the complete configuration."""
