"""Adapters: those that can be merged into a model afterwards, and a drafter's, with the switches of its training."""

from collections.abc import Iterator
from dataclasses import fields

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.utils import wildcard_match

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.model.draft_adapter import PROJECTIONS, DraftLoRA
from nemodiff_train.objective import ObjectiveConfig

LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""Linear layers of a transformer block."""
_OF_MASKS = {"mask_token", "mask_embedding_noise", "mask_embedding_noise_steps"}
_USED = _OF_MASKS | {
    "stage", "seed", "block_size", "block_schedule", "block_sizes", "block_steps", "clean_attention", "shift",
    "views",
}  # fmt: skip
"""Settings of the objective that a drafter's training follows or that are refused by themselves."""


def problems(config: TriModeConfig) -> Iterator[str]:
    """Yield what keeps adapters or a drafter from being trained, or adapters from being merged, one line each.

    Args:
        config: Its model still as the checkpoint describes it.
    """
    adapters = config.peft
    if isinstance(adapters, LoRA | DraftLoRA) and min(adapters.dim, adapters.alpha) < 1:
        yield f"the adapters have rank {adapters.dim} and alpha {adapters.alpha}; both take at least 1"
    elif config.drafter and not isinstance(adapters, DraftLoRA):
        yield "a drafter needs peft=DraftLoRA(...) in its recipe"
    elif isinstance(adapters, DraftLoRA):
        yield from _draft_target_problems(config, adapters)
    elif type(adapters) is LoRA:
        yield from _target_problems(adapters, config.model.num_layers)
    elif adapters is not None:
        yield (
            f"peft is {type(adapters).__name__}, whose adapters cannot be merged into the model afterwards; use "
            "LoRA, as lora_rank does"
        )
    if not config.drafter:
        return
    start = config.checkpoint.pretrained_checkpoint
    if not config.start:
        yield f"a drafter starts from a Megatron checkpoint, which '{start}' is not; use 'nemodiff convert import'"
    if config.model.mask_token_id is None and config.has_masks:
        yield f"'{start}' has no mask token; a drafter is trained for a model after its joint stage"
    yield from _switch_problems(config)


def _target_problems(lora: LoRA, layers: int) -> Iterator[str]:
    names = [f"decoder.layers.{number}.{layer}" for number in range(layers) for layer in LAYERS]
    if not lora.target_modules and not any(_matches(pattern, "output_layer") for pattern in lora.exclude_modules):
        yield "peft adapts the output layer, whose losses would leave it out; add 'output_layer' to exclude_modules"
    for target in lora.target_modules or ():
        if not any(_matches(target, name) for name in names):
            yield (
                f"peft.target_modules has '{target}', which is not a linear layer of a transformer block; use "
                f"{', '.join(layer.rpartition('.')[2] for layer in LAYERS)}"
            )


def _matches(pattern: str, name: str) -> bool:
    """Return whether Bridge takes a pattern for a module: by the module's own name, or by its whole name."""
    return pattern == name.rpartition(".")[2] or bool(wildcard_match(pattern, name))


def _draft_target_problems(config: TriModeConfig, adapters: DraftLoRA) -> Iterator[str]:
    targets, model = set(adapters.target_modules), config.model
    if not targets and adapters.selector_rank:
        return
    if targets not in ({"linear_proj"}, set(PROJECTIONS)):
        yield f"peft.target_modules={adapters.target_modules}; use ['linear_proj'] or {list(PROJECTIONS)}"
    elif len(targets) > 1 and not model.gated_linear_unit:
        yield "the model has no gate_proj; train adapters of the attention outputs alone: targets=o_proj"
    elif len(targets) > 1 and model.num_query_groups < model.tensor_model_parallel_size:
        yield (
            f"adapters of all projections take at most as many tensor-parallel ranks as the model has key heads, "
            f"{model.num_query_groups}; lower model.tensor_model_parallel_size"
        )


def _switch_problems(config: TriModeConfig) -> Iterator[str]:
    model, objective, length = config.model, config.objective, config.dataset.seq_length
    if objective.noisy_views != 1:
        yield "a drafter is trained with one view per sample; leave the objective's switches out"
    used = _USED if config.has_masks else _USED - _OF_MASKS
    for field in fields(objective):
        if field.name not in used and getattr(objective, field.name) != getattr(ObjectiveConfig(), field.name):
            yield f"objective.{field.name} has no effect on a drafter; leave it out"
    for name in ("shift", "clean_attention"):
        trained, asked = getattr(model, name), getattr(objective, name)
        if trained != asked:
            yield f"objective.{name}={asked}, but the model was trained with {trained}; leave it out"
    if objective.clean_attention != "causal":
        yield "the model has a block-causal clean half, which cannot verify drafts; start from another model"
    smallest = min([objective.block_size, *(objective.block_sizes if objective.block_schedule != "fixed" else ())])
    if config.drafter and config.drafter.draft_kind.known_token_in_block and smallest < 2:
        yield f"a block of {smallest} has no token to draft after its first; use blocks of 2 or more"
    if objective.block_schedule == "fixed" and length % objective.block_size:
        yield f"dataset.seq_length={length} is not a multiple of objective.block_size={objective.block_size}"
