"""The parameters of a model in training, outside its forward pass."""

import contextlib
from collections.abc import Iterator, Sequence

from megatron.core.transformer import MegatronModule


@contextlib.contextmanager
def gathered_parameters(chunks: Sequence[MegatronModule]) -> Iterator[None]:
    """Hold complete parameters on every rank, where the distributed optimizer gathers them while the model runs.

    Args:
        chunks: This pipeline rank's model chunks, as Bridge wraps them for data parallelism.
    """
    overlapped = [chunk for chunk in chunks if getattr(chunk, "use_forward_hook", False)]
    hooked = [chunk for chunk in overlapped if chunk.remove_forward_pre_hook_handles]
    for chunk in overlapped:
        if chunk in hooked:
            chunk.disable_forward_pre_hook()
        else:  # Megatron adds the hooks after the first step
            chunk.start_param_sync(force_sync=True)
    yield
    for chunk in hooked:
        chunk.enable_forward_pre_hook()
