"""The training of a drafter: its start, its adapters, and switches that belong to other runs."""

from collections.abc import Iterator

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.draft_adapter import DraftLoRA


def problems(config: TriModeConfig) -> list[str]:
    """Return what keeps a drafter from being trained, one line each; nothing for other runs.

    Args:
        config: Its model still as the checkpoint describes it.
    """
    return [*_model_problems(config), *_switch_problems(config)] if config.drafter else []


def _model_problems(config: TriModeConfig) -> Iterator[str]:
    adapters, start = config.peft, config.checkpoint.pretrained_checkpoint
    if not isinstance(adapters, DraftLoRA):
        yield "a drafter needs peft=DraftLoRA(...) in its recipe"
    elif min(adapters.dim, adapters.alpha) < 1:
        yield f"the adapters have rank {adapters.dim} and alpha {adapters.alpha}; both take at least 1"
    if not start or not Checkpoint.find(start):
        yield f"a drafter starts from a Megatron checkpoint, which '{start}' is not; use 'nemodiff convert import'"
    if config.model.mask_token_id is None:
        yield f"'{start}' has no mask token; a drafter is trained for a model after its joint stage"


def _switch_problems(config: TriModeConfig) -> Iterator[str]:
    model, objective, length = config.model, config.objective, config.dataset.seq_length
    if objective.noisy_views != 1 or config.dataset.needs_segment_ids:
        yield "a drafter is trained on text, one view and one document per sample; leave the objective's switches out"
    for name in ("shift", "clean_attention"):
        trained, asked = getattr(model, name), getattr(objective, name)
        if trained != asked:
            yield f"objective.{name}={asked}, but the model was trained with {trained}; leave it out"
    if objective.clean_attention != "causal":
        yield "the model has a block-causal clean half, which cannot verify drafts; start from another model"
    if length % objective.block_size:
        yield f"dataset.seq_length={length} is not a multiple of objective.block_size={objective.block_size}"
    if model.context_parallel_size > 1:
        yield "a drafter is not trained under context parallelism; set model.context_parallel_size=1"
