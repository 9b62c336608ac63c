"""What comes after decoding: records, scores, metrics, the report."""
