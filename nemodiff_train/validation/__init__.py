"""Refuse a configuration that cannot run: every problem with its remedy, before anything is built."""
