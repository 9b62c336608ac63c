"""Every layout that a run could have on a number of GPUs."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.planning.hardware import NODE
from nemodiff_train.validation.layout import layout_problems

CONTEXTS = (1, 2, 4, 8)
TENSORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; their product is the number of GPUs."""

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batches: int
    """Of a step, on each replica."""
    recompute: bool
    """Keep only each layer's input, and run it forward again in the backward pass."""

    @property
    def sequence(self) -> bool:
        """Sequence parallelism always comes with tensor parallelism."""
        return self.tensor > 1

    @property
    def settings(self) -> str:
        """The overrides that give a recipe this layout."""
        words = {
            "tensor_model_parallel_size": str(self.tensor),
            "sequence_parallel": str(self.sequence).lower(),
            "pipeline_model_parallel_size": str(self.pipeline),
            "context_parallel_size": str(self.context),
        }
        if self.recompute:
            words |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": "1"}
        return " ".join(f"model.{name}={value}" for name, value in words.items())


def layouts(config: TriModeConfig, gpus: int) -> Iterator[Layout]:
    """Layouts that training would not refuse: tensor groups within a node, equal stages, no virtual ones."""
    pipelines = [size for size in range(1, config.model.num_layers + 1) if config.model.num_layers % size == 0]
    contexts = (1,) if config.drafter else CONTEXTS
    for tensor, pipeline, context in product(TENSORS, pipelines, contexts):
        one = tensor * pipeline * context
        if tensor > NODE or gpus % one or layout_problems(_laid_out(config, tensor, pipeline, context), gpus):
            continue
        data = gpus // one
        micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * data)
        for recompute in (False, True):
            yield Layout(tensor, pipeline, context, data, micro_batches, recompute)


def _laid_out(config: TriModeConfig, tensor: int, pipeline: int, context: int) -> TriModeConfig:
    """A copy of what :func:`layout_problems` reads, with another layout."""
    other = copy.copy(config)
    other.model = copy.copy(config.model)
    model = other.model
    model.tensor_model_parallel_size, model.sequence_parallel = tensor, tensor > 1
    model.pipeline_model_parallel_size, model.context_parallel_size = pipeline, context
    model.virtual_pipeline_model_parallel_size = model.pipeline_model_parallel_layout = None
    model.num_layers_in_first_pipeline_stage = model.num_layers_in_last_pipeline_stage = None
    model.account_for_embedding_in_pipeline_split = model.account_for_loss_in_pipeline_split = False
    return other
