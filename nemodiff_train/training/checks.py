"""What can be known to be wrong before anything is built."""

from collections.abc import Iterator
from pathlib import Path

from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.manifest import check_blend
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.drafter.checks import drafter_problems
from nemodiff_train.errors import UserError
from nemodiff_train.model.families import TRI_MODE, architecture
from nemodiff_train.model.folders import is_drafter, is_megatron_checkpoint, newest_iteration, read_json, run_config
from nemodiff_train.training.config import TriModeConfig
from nemodiff_train.training.layout import layout_problems


def check(config: TriModeConfig, world_size: int) -> None:
    """Refuse a configuration that cannot run, all problems at once.

    Raises:
        UserError: One line with every problem found.
    """
    if found := list(problems(config, world_size)):
        raise UserError("; ".join(found))


def problems(config: TriModeConfig, world_size: int) -> Iterator[str]:
    """What keeps a configuration from running on so many processes, a line each."""
    yield from config.objective.problems(config.dataset.seq_length)
    yield from layout_problems(config, world_size)
    yield from config.resilience.problems()
    yield from _resume_problems(config)
    if config.drafter:
        yield from drafter_problems(config)
    if config.dataset.reset_position_ids and not config.dataset.reset_attention_mask:
        yield "dataset.reset_position_ids=true takes dataset.reset_attention_mask=true as well"
    for look in (_check_start, _check_data):
        try:
            look(config)
        except UserError as error:
            yield str(error)


def _check_start(config: TriModeConfig) -> None:
    if not config.checkpoint.pretrained_checkpoint:
        return
    start = Path(config.checkpoint.pretrained_checkpoint)
    if is_drafter(start):
        raise UserError(f"'{start}' is a drafter; start from the model that it was trained for")
    check_weights(start)
    if (start / "config.json").is_file() and architecture(read_json(start / "config.json")) == TRI_MODE:
        raise UserError(
            f"'{start}' has code of its own, which never runs here; make a Megatron checkpoint of it with "
            "'nemodiff convert import' and start from that"
        )


def _resume_problems(config: TriModeConfig) -> list[str]:
    """What keeps the optimizer state in the output folder from being loaded."""
    if not config.checkpoint.load or not is_megatron_checkpoint(Path(config.checkpoint.load)):
        return []
    try:
        iteration = newest_iteration(Path(config.checkpoint.load))
    except UserError:
        return []  # none is whole: WholeCheckpoints tells the damaged from the unfinished
    began = run_config(iteration)
    was, now = (bool(c["use_distributed_optimizer"]) for c in (began["optimizer"], vars(config.optimizer)))
    if was != now:
        return [
            f"'{iteration}' was saved with optimizer.use_distributed_optimizer={str(was).lower()}, whose state the "
            "other optimizer cannot load; set it so (and ddp.use_distributed_optimizer), or name another output"
        ]
    layout = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    moved = [name for name in layout if began["model"][name] != getattr(config.model, name)]
    if was and moved and not began["checkpoint"]["dist_ckpt_optim_fully_reshardable"]:
        return [
            f"'{iteration}' was saved for its own layout, but model.{moved[0]} has changed; keep the layout, or save "
            "with checkpoint.dist_ckpt_optim_fully_reshardable=true before changing it"
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
