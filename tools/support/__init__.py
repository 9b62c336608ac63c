"""Models, data, runs, faults and ranks in small, shared by the tools and the tests."""
