"""The layouts that a run can have, and estimates of their memory and step time, without a GPU."""
