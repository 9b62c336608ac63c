"""``nemodiff env``: one page for a bug report, on any machine, whatever is missing there."""

import argparse
import importlib

from nemodiff_train.runtime import init_runtime

_MACHINE = "nemodiff_train.cli.machine"  # which imports Megatron
SECTIONS = (
    ("Machine", "nemodiff_train.runtime.versions", "machine"),
    ("Packages", "nemodiff_train.runtime.versions", "packages"),
    ("CUDA", _MACHINE, "torch_and_cuda"),
    ("A run would use", _MACHINE, "used"),
    ("A run may ask for", _MACHINE, "refused"),
)
"""Title, module and function of each part; one whose module cannot be imported says so, and the next one follows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments: none."""


def run(arguments: argparse.Namespace) -> None:
    """Print the page to standard output."""
    reason = ""
    for title, module, function in SECTIONS:
        print(title, flush=True)
        try:
            if module == _MACHINE:
                init_runtime()
            for name, value in getattr(importlib.import_module(module), function)():
                print(f"  {name:<30}{value}", flush=True)
        except Exception as error:  # whatever is broken here is what the page is to show
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  {'REFUSED':<30}{'as above' if line == reason else line}", flush=True)
            reason = line
