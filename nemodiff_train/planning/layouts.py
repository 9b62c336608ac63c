"""The layouts that a run can have on a number of GPUs."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.planning import rules

_SIZES = (1, 2, 4, 8)
"""Tensor- and context-parallel sizes; tensor groups stay within a node."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, whose product is the number of GPUs; tensor groups share the sequence as well."""

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batches: int
    """Micro-batches per step on each replica."""
    recompute: bool
    """Whether only each layer's input is kept, and the layer run forward again in the backward pass."""

    @property
    def settings(self) -> str:
        """Return the overrides that give a recipe this layout."""
        fields = {
            "tensor_model_parallel_size": str(self.tensor),
            "sequence_parallel": str(self.tensor > 1).lower(),
            "pipeline_model_parallel_size": str(self.pipeline),
            "context_parallel_size": str(self.context),
        }
        if self.recompute:
            fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": "1"}
        return " ".join(f"model.{name}={value}" for name, value in fields.items())


def layout_of(config: TriModeConfig, gpus: int) -> Layout:
    """Return the layout that a configuration has on a number of GPUs."""
    model = config.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    data = gpus // (tensor * pipeline * model.context_parallel_size)
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * data)
    recompute = model.recompute_granularity == "full"
    return Layout(tensor, pipeline, model.context_parallel_size, data, micro_batches, recompute)


def layouts(config: TriModeConfig, gpus: int) -> Iterator[Layout]:
    """Yield the layouts that training accepts: tensor groups within a node, equal stages, no virtual ones.

    Args:
        config: The run; its own layout does not matter.
        gpus: Number of GPUs.
    """
    layers = config.model.num_layers
    pipelines = [size for size in range(1, layers + 1) if layers % size == 0]
    for tensor, pipeline, context in product(_SIZES, pipelines, _SIZES):
        if gpus % (tensor * pipeline * context):
            continue
        candidate = copy.copy(config)  # everything but the model is shared
        candidate.model = model = copy.copy(config.model)
        model.tensor_model_parallel_size, model.sequence_parallel = tensor, tensor > 1
        model.pipeline_model_parallel_size, model.context_parallel_size = pipeline, context
        model.virtual_pipeline_model_parallel_size = model.pipeline_model_parallel_layout = None
        model.num_layers_in_first_pipeline_stage = model.num_layers_in_last_pipeline_stage = None
        model.account_for_embedding_in_pipeline_split = model.account_for_loss_in_pipeline_split = False
        if rules.problems(candidate, gpus):
            continue
        for granularity in (None,) if config.selector_rank else (None, "full"):  # it goes backward through no layer
            model.recompute_granularity = granularity
            yield layout_of(candidate, gpus)
