"""Running Megatron where some of what it expects is missing.

Two separate jobs:

* :mod:`nemodiff_train.runtime.packages`: stand-ins for packages that Megatron Bridge imports without a
  guard and this project never calls.  Also needed on a GPU machine without Transformer Engine.
* :mod:`nemodiff_train.runtime.cpu`: the CPU standing in for CUDA, where no GPU works.

:func:`init_runtime` does both, once, and must run before anything imports ``megatron``.
"""

from nemodiff_train.runtime.start import Host, init_runtime

__all__ = ["Host", "init_runtime"]
