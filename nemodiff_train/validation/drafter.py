"""What keeps a drafter from being trained."""

from collections.abc import Iterator
from typing import Any

from nemodiff_train.model.checkpoint import Checkpoint


def drafter_problems(config: Any) -> Iterator[str]:
    """What is wrong with a recipe that trains a drafter, a line each.

    Args:
        config: The ``TriModeConfig``, its model still as the checkpoint describes it.
    """
    yield from config.drafter.problems()
    model, objective, start = config.model, config.objective, config.checkpoint.pretrained_checkpoint
    if config.peft is None:
        yield "a drafter needs peft=DraftLoRA(...) in its recipe"
    elif min(config.peft.dim, config.peft.alpha) < 1:
        yield f"the adapters' rank is {config.peft.dim} and alpha {config.peft.alpha}; both take at least 1"
    if not start or not Checkpoint.find(start):
        yield f"a drafter starts from a Megatron checkpoint, which '{start}' is not; use 'nemodiff convert import'"
    if model.mask_token_id is None:
        yield f"'{start}' has no mask token; a drafter is trained for a model after its joint stage"
    if objective.noisy_views != 1 or config.dataset.needs_segment_ids:
        yield "a drafter is trained on text, one view and one document a sample; leave the objective's switches out"
    for name in ("shift", "clean_attention"):
        trained, asked = getattr(model, name), getattr(objective, name)
        if trained != asked:
            yield f"objective.{name}={asked}, but the model was trained with {trained}; leave it out"
    if objective.clean_attention != "causal":
        yield "the model has a block-causal clean half, which cannot verify drafts"
    if config.dataset.seq_length % objective.block_size:
        yield f"dataset.seq_length={config.dataset.seq_length} is no multiple of {objective.block_size}, the block"
    if model.context_parallel_size > 1:
        yield "a drafter is not trained under context parallelism; set model.context_parallel_size=1"
