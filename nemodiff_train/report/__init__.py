"""The report of an evaluation: a table on the terminal, and an HTML page with charts and a replay."""
