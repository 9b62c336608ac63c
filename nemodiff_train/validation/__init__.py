"""Refuse a configuration that cannot run, before anything is built."""
