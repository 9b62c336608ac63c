"""A Hugging Face directory that decodes itself: its own code, its configuration, and its card."""
