"""What can be known to be wrong before anything is built."""

from pathlib import Path

from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.manifest import check_blend
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.training.config import TriModeConfig
from nemodiff_train.training.layout import layout_problems


def check(config: TriModeConfig, world_size: int) -> None:
    """Refuse a configuration that cannot run, all problems at once.

    Raises:
        UserError: One line with every problem found.
    """
    problems = [
        *config.objective.problems(config.dataset.seq_length),
        *layout_problems(config, world_size),
    ]
    if config.dataset.reset_position_ids and not config.dataset.reset_attention_mask:
        problems.append("dataset.reset_position_ids=true takes dataset.reset_attention_mask=true as well")
    if problems:
        raise UserError("; ".join(problems))
    if config.checkpoint.pretrained_checkpoint:
        check_weights(Path(config.checkpoint.pretrained_checkpoint))
    _check_data(config)


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
