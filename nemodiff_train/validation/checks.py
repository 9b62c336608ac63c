"""What can be known to be wrong before anything is built."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch

from nemodiff_train.attention.selection import kernel_problems
from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.blend import check_blend
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.decode import MODES
from nemodiff_train.errors import UserError, nearest
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.files import check_can_be_made
from nemodiff_train.model.checkpoint import Checkpoint, Kind, read_json
from nemodiff_train.model.families import TRI_MODE, architecture
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.runtime import init_runtime
from nemodiff_train.validation.drafter import drafter_problems
from nemodiff_train.validation.layout import layout_problems
from nemodiff_train.validation.ranges import choice_problems, range_problems


def check(config: TriModeConfig, world_size: int) -> None:
    """Refuse a configuration that cannot run, all problems at once.

    Raises:
        UserError: One line with every problem found.
    """
    if found := list(problems(config, world_size)):
        raise UserError("; ".join(found))


def problems(config: TriModeConfig, world_size: int) -> Iterator[str]:
    """What keeps a configuration from running on so many processes, a line each."""
    if found := range_problems(config):
        yield from found  # what follows divides by some of them
        return
    yield from choice_problems(config)
    yield from config.objective.problems(config.dataset.seq_length)
    yield from layout_problems(config, world_size)
    cuda, positions = init_runtime().cuda, config.dataset.seq_length * (config.objective.noisy_views + 1)
    yield from kernel_problems(config.model, positions, cuda)
    yield from _precision_problems(config, cuda)
    yield from _overlap_problems(config)
    yield from _setting_problems(config)
    yield from config.resilience.problems()
    yield from _resume_problems(config)
    if config.drafter:
        yield from drafter_problems(config)
    elif config.peft is not None and not Checkpoint.find(config.checkpoint.pretrained_checkpoint or ""):
        yield "adapters start from a Megatron checkpoint; make one with 'nemodiff convert import'"
    yield from config.dataset.problems(config.objective)
    for look in (_check_output, _check_start, _check_data, _check_evaluation):
        try:
            look(config)
        except UserError as error:
            yield str(error)


def _setting_problems(config: TriModeConfig) -> Iterator[str]:
    """What Bridge itself would refuse, later and with a traceback."""
    for section in ("optimizer", "logger", "train", "scheduler", "checkpoint"):
        try:
            copy.deepcopy(getattr(config, section)).finalize()
        except (AssertionError, ValueError) as error:
            yield f"{section}: {error}"


def _overlap_problems(config: TriModeConfig) -> Iterator[str]:
    """What keeps communication from being hidden behind computation as asked."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    model, ddp = config.model, config.ddp
    sharded = ddp.use_distributed_optimizer or config.optimizer.use_distributed_optimizer
    if (ddp.overlap_param_gather or config.optimizer.overlap_param_gather) and not sharded:
        yield "ddp.overlap_param_gather=true takes optimizer.use_distributed_optimizer=true as well"
    name = "comm_overlap" if config.comm_overlap and config.comm_overlap.tp_comm_overlap else "model"
    if name == "model" and not model.tp_comm_overlap:
        return
    if not HAVE_TE:
        yield f"{name}.tp_comm_overlap=true needs Transformer Engine, which is not installed; leave it out"
    if model.tensor_model_parallel_size == 1 or not model.sequence_parallel:
        yield f"{name}.tp_comm_overlap=true needs tensor and sequence parallelism; leave it out"
    if config.evaluation.interval:
        yield f"{name}.tp_comm_overlap=true excludes decoding in the loop; set evaluation.interval=0"


def _precision_problems(config: TriModeConfig, cuda: bool) -> Iterator[str]:
    """What keeps the matrix products from being done in the format that was asked for."""
    from megatron.bridge.training.mixed_precision import MIXED_PRECISION_RECIPES, get_mixed_precision_config
    from megatron.core.extensions.transformer_engine import HAVE_TE

    kind, known = config.mixed_precision, [name for name in MIXED_PRECISION_RECIPES if "-" not in name]
    if isinstance(kind, str) and kind.replace("-", "_") not in known:
        yield f"precision '{kind}' is unknown; use one of {', '.join(known)}.{nearest(kind, known)}"
    elif kind is not None:
        chosen = get_mixed_precision_config(kind)
        if not (chosen.fp8 or chosen.fp4):
            return
        least = (10, 0) if chosen.fp4 or chosen.fp8_recipe == "mxfp8" else (8, 9)
        fits = cuda and torch.cuda.get_device_capability() >= least
        if not (HAVE_TE and fits):
            yield (
                f"{'fp4' if chosen.fp4 else 'fp8'} needs Transformer Engine and a GPU of compute capability "
                f"{least[0]}.{least[1]} or more; use bf16_mixed"
            )


def _check_output(config: TriModeConfig) -> None:
    if config.checkpoint.save:
        check_can_be_made(Path(config.checkpoint.save))


def _check_evaluation(config: TriModeConfig) -> None:
    chosen = config.evaluation
    if chosen.interval:
        if unknown := [mode for mode in chosen.modes if mode not in MODES]:
            raise UserError(
                f"evaluation.modes has '{unknown[0]}'; known: {', '.join(MODES)}.{nearest(unknown[0], MODES)}"
            )
        load_task(chosen.task, scorer=chosen.scorer, count=chosen.count)


def _check_start(config: TriModeConfig) -> None:
    if not config.checkpoint.pretrained_checkpoint:
        return
    start = Path(config.checkpoint.pretrained_checkpoint)
    checkpoint = Checkpoint.find(start)
    if checkpoint and checkpoint.kind is Kind.DRAFTER:
        raise UserError(f"'{start}' is a drafter; start from the model that it was trained for")
    if checkpoint and checkpoint.kind is Kind.LORA:
        raise UserError(
            f"'{start}' holds adapters alone; merge them with 'nemodiff convert export' and start from that"
        )
    check_weights(start)
    _check_shape(config, model_from(checkpoint or str(start)), start)
    if (start / "config.json").is_file() and architecture(read_json(start / "config.json")) == TRI_MODE:
        raise UserError(
            f"'{start}' has code of its own, which never runs here; make a Megatron checkpoint of it with "
            "'nemodiff convert import' and start from that"
        )


_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


def _check_shape(config: TriModeConfig, stored: TriModeModelProvider, start: Path) -> None:
    """Refuse a model of another shape; Bridge would leave layers that the checkpoint lacks as they were drawn."""
    for name in _SHAPE:
        was, now = getattr(stored, name), getattr(config.model, name)
        if was != now:
            raise UserError(f"model.{name} is {now}, but '{start}' has {was}; leave it as it is there")


def _resume_problems(config: TriModeConfig) -> list[str]:
    """What keeps a run from going on where it should: its checkpoints are missing, or do not fit."""
    load, step = config.checkpoint.load, config.checkpoint.ckpt_step
    try:
        saved = Checkpoint.find(load) if load else None
    except UserError:
        return []  # none is complete: WholeCheckpoints tells the damaged from the unfinished
    if load and load != config.checkpoint.save and not saved:
        return [f"checkpoint.load='{load}' has no checkpoint; leave it out to go on with the output's own"]
    if step is not None and not (Path(load or "") / f"iter_{step:07d}").is_dir():
        return [f"checkpoint.ckpt_step={step}: there is no such checkpoint in '{load}'"]
    if not saved:
        return []
    iteration, began = saved.iteration, saved.run_config
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
    prefixes = config.dataset.prefixes
    if not prefixes:
        raise UserError("dataset.data is empty; give the prefix of a .bin/.idx made by 'nemodiff data prepare'")
    mask = config.find_mask_token() if config.objective.stage == "joint" else None
    tokenizer = load_tokenizer(str(config.tokenizer.tokenizer_model))
    check_blend(prefixes, tokenizer, mask, config.dataset.conversations)
