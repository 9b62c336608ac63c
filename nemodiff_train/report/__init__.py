"""Pages that show an evaluation."""
