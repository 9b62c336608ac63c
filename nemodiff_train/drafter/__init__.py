"""A drafter for linear self-speculation: low-rank adapters that are active in the draft pass alone."""
