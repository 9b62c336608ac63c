"""``python -m nemodiff_train`` is the ``nemodiff`` command (torchrun needs a module to start)."""

from nemodiff_train.cli import main

if __name__ == "__main__":  # checkpoint saving spawns a process that imports this file again
    raise SystemExit(main())
