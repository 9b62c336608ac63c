"""What can be known to be wrong before anything is built."""

from pathlib import Path

from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.manifest import check_blend
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.training.config import TriModeConfig


def check(config: TriModeConfig, world_size: int) -> None:
    """Refuse a configuration that cannot run, all problems at once.

    Raises:
        UserError: One line with every problem found.
    """
    problems = [
        *config.objective.problems(config.dataset.seq_length),
        *_layout_problems(config, world_size),
        *_batch_problems(config, world_size),
    ]
    if problems:
        raise UserError("; ".join(problems))
    if config.checkpoint.pretrained_checkpoint:
        check_weights(Path(config.checkpoint.pretrained_checkpoint))
    _check_data(config)


def _layout_problems(config: TriModeConfig, world_size: int) -> list[str]:
    model = config.model
    tp, pp, cp = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    found = []
    if model.num_query_groups % tp:
        found.append(
            f"model.tensor_model_parallel_size={tp} does not divide the model's {model.num_query_groups} "
            f"key-value heads; use a divisor of {model.num_query_groups}"
        )
    if model.num_layers % pp:
        found.append(f"model.pipeline_model_parallel_size={pp} does not divide the model's {model.num_layers} layers")
    if cp != 1:
        found.append(f"model.context_parallel_size={cp}: doubled sequences cannot be split yet; use 1")
    if world_size % (tp * pp):
        found.append(
            f"{world_size} processes were started, but the layout (tensor {tp} x pipeline {pp}) takes a "
            f"multiple of {tp * pp}; start torchrun with --nproc-per-node {tp * pp}"
        )
    return found


def _batch_problems(config: TriModeConfig, world_size: int) -> list[str]:
    model, train = config.model, config.train
    replicas = max(1, world_size // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size))
    if train.global_batch_size % (train.micro_batch_size * replicas):
        return [
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {replicas} data-parallel replicas"
        ]
    return []


def _check_data(config: TriModeConfig) -> None:
    prefixes = [part for part in map(str, config.dataset.data) if not _is_weight(part)]
    if not prefixes:
        raise UserError("dataset.data is empty; give the prefix of a .bin/.idx made by 'nemodiff data prepare'")
    mask = config.find_mask_token() if config.objective.stage == "joint" else None
    check_blend(prefixes, load_tokenizer(str(config.tokenizer.tokenizer_model)), mask)


def _is_weight(part: str) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return True
