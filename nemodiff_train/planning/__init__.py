"""Estimates of memory and step time for every layout of a run, without a GPU."""
