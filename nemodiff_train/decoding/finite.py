"""Logits that are not finite: no text and no score is made of them, and the error says where they begin."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from nemodiff_train.errors import UserError

LayerPosition = tuple[int, int]
"""A layer counted from 1, 0 for the embedding, and a position in the text."""


class NotFinite(UserError):
    """Logits or losses are infinite or not numbers."""


def check_finite(
    values: Tensor, chunks: list[GPTModel], positions: Tensor, repeat: Callable[[], object], what: str = "logits"
) -> None:
    """Refuse what a model has computed if any of it is infinite or not a number; called on all of its ranks.

    Args:
        values: What it has computed, fp32, the same on all ranks.
        chunks: This pipeline rank's chunks.
        positions: [batch, tokens] position in the text of each token of the forward.
        repeat: Computes the same again.
        what: Name of the values.

    Raises:
        NotFinite: Names the first layer and position whose states are not finite.
    """
    if bool(values.sum().isfinite()) or bool(values.isfinite().all()):
        return
    chunks = [unwrap_model(chunk) for chunk in chunks]
    config = chunks[0].config
    name = str(config.params_dtype).removeprefix("torch.")
    layer, position = min(_first_non_finite(chunks, positions, repeat), default=(config.num_layers + 1, 0))
    where = (
        "in the output layer"
        if layer > config.num_layers
        else f"from layer {layer} of {config.num_layers} on, first at position {position}"
        if layer
        else f"from the embedding on, first at position {position}"
    )
    remedy = (
        f"float16 ends at {torch.finfo(torch.float16).max:,.0f}: take weights in bfloat16 or float32"
        if config.params_dtype == torch.float16
        else "take another checkpoint"
    )
    raise NotFinite(f"the model's {what} are infinite or not numbers, {where} (weights in {name}); {remedy}")


def _first_non_finite(chunks: list[GPTModel], positions: Tensor, repeat: Callable[[], object]) -> list[LayerPosition]:
    """Find, in a second forward, each pipeline rank's first layer and position whose states are not finite."""
    found_at: list[LayerPosition] = []

    def make_hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            broken = ~inputs[0].isfinite().all(-1).T  # of [tokens, batch, hidden]
            if not found_at and bool(broken.any()):
                found_at.append((layer, int(positions.expand_as(broken)[broken].min())))

        return hook

    with ExitStack() as hooks:
        for chunk in chunks:
            for layer in chunk.decoder.layers:  # what comes into a layer is what the one before has computed
                hook = make_hook(layer.layer_number - 1)
                hooks.enter_context(layer.input_layernorm.register_forward_pre_hook(hook))
            if (final := chunk.decoder.final_layernorm) is not None:
                hooks.enter_context(final.register_forward_pre_hook(make_hook(chunk.config.num_layers)))
        repeat()
    group = chunks[0].pg_collection.pp
    gathered: list[list[LayerPosition]] = [found_at] * group.size()
    if group.size() > 1:
        dist.all_gather_object(gathered, found_at, group=group)
    return [place for of_rank in gathered for place in of_rank]
