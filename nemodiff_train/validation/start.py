"""Check what a run starts from: the pretrained checkpoint, and the run's own checkpoints that it resumes from."""

from collections.abc import Iterator
from pathlib import Path

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.errors import UserError, refusal
from nemodiff_train.model.checkpoint import Checkpoint, Kind
from nemodiff_train.model.checksums import identity, iterations
from nemodiff_train.model.families import SDAR, TESTED, TRI_MODE
from nemodiff_train.model.hf_directory import HFDirectory
from nemodiff_train.model.pretrained import model_from

_SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "rotary_base", "rotary_percent", "rope_parameters", "query_scale_beta", "layernorm_epsilon",
    "normalization", "qk_layernorm", "add_qkv_bias", "gated_linear_unit", "share_embeddings_and_output_weights",
)  # fmt: skip
"""Settings of a model that its ``config.json`` fixes: with others, what is trained is not what is exported."""
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "transformer_impl")
"""Settings that decide in which order a rank's optimizer holds the parameters."""


def problems(config: TriModeConfig) -> list[str]:
    """Return what keeps a run from starting where it should, one line each."""
    return [*_resume_problems(config), *refusal(lambda: _check_pretrained(config))]


def _check_pretrained(config: TriModeConfig) -> None:
    folder = config.checkpoint.pretrained_checkpoint
    checkpoint = config.start
    if checkpoint is None and config.peft is not None and config.drafter is None:
        raise UserError("adapters start from a Megatron checkpoint; make one with 'nemodiff convert import'")
    if not folder:
        return
    start = Path(folder)
    if checkpoint and checkpoint.kind is Kind.DRAFTER:
        raise UserError(f"'{start}' is a drafter; start from the model that it was trained for")
    if checkpoint and checkpoint.kind is Kind.LORA:
        raise UserError(
            f"'{start}' holds adapters alone; merge them with 'nemodiff convert export' and start from that"
        )
    directory = None if checkpoint else HFDirectory.open(folder)
    if directory:
        check_weights(directory)
    stored = model_from(checkpoint or folder)
    for setting in _SHAPE:  # Bridge would keep random weights where the checkpoint has none of this shape
        expected, actual = getattr(stored, setting), getattr(config.model, setting)
        if expected != actual:
            raise UserError(f"model.{setting} is {actual}, but '{start}' has {expected}; leave it as it is there")
    if directory and (name := directory.architecture) not in TESTED:
        reason = f"is a {name}, whose computation is compared with Transformers' at import alone"
        if name in (SDAR, TRI_MODE):
            reason = "has code of its own, which never runs here"
        raise UserError(
            f"'{start}' {reason}; make a Megatron checkpoint of it with 'nemodiff convert import' and start from that"
        )


def _resume_problems(config: TriModeConfig) -> Iterator[str]:
    load, step = config.checkpoint.load, config.checkpoint.ckpt_step
    if not load:
        yield "checkpoint.load is not set: no start would resume from the checkpoints of the one before; leave it out"
    elif config.saved is not None:
        yield from _changes_since(config.saved, config)
    elif load != config.checkpoint.save and not iterations(Path(load)):
        yield f"checkpoint.load='{load}' has no checkpoint; leave it out to resume from the output's own"
    elif step is not None and not (Path(load) / f"iter_{step:07d}").is_dir():
        yield f"checkpoint.ckpt_step={step}: there is no such checkpoint in '{load}'"


def _check_base(saved: Checkpoint, config: TriModeConfig) -> None:
    """Refuse to resume adapters on other weights: Bridge loads the base's newest iteration at every start."""
    if config.peft is None or saved.kind not in (Kind.LORA, Kind.DRAFTER):
        return
    base, start = saved.base, config.start
    if start is None or identity(start.iteration) != identity(base.iteration):
        raise UserError(
            f"'{saved.iteration}' holds adapters of '{base.iteration}', but the run would start from "
            f"'{start.iteration if start else config.checkpoint.pretrained_checkpoint}'; name another output, or the "
            "folder of that checkpoint as start_from"
        )


def _changes_since(saved: Checkpoint, config: TriModeConfig) -> Iterator[str]:
    """Yield the changes that the saved optimizer state cannot follow."""
    before, iteration = saved.run_config, saved.iteration
    if not (before.get("optimizer") and before.get("checkpoint")):
        yield f"'{iteration}' was not saved by a run; give it as start_from, with another output"
        return
    yield from refusal(lambda: _check_base(saved, config))
    was_sharded = bool(before["optimizer"]["use_distributed_optimizer"])
    if was_sharded != bool(config.optimizer.use_distributed_optimizer):
        yield (
            f"'{iteration}' was saved with optimizer.use_distributed_optimizer={str(was_sharded).lower()}, whose "
            "state the other optimizer cannot load; set it so (and ddp.use_distributed_optimizer), or start another "
            f"run with start_from={saved.path} output=NEW"
        )
        return
    moved = [name for name in _LAYOUT if before["model"].get(name) != getattr(config.model, name)]
    if was_sharded and moved and not before["checkpoint"]["dist_ckpt_optim_fully_reshardable"]:
        yield (
            f"'{iteration}' was saved for its own layout and layers, but model.{moved[0]} is now "
            f"{getattr(config.model, moved[0])}, not {before['model'].get(moved[0])}; keep that, save with "
            "checkpoint.dist_ckpt_optim_fully_reshardable=true before changing it, or start another run with "
            f"start_from={saved.path} output=NEW"
        )
