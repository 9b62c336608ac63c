"""A resumed run: its settings are compared with those that it was saved with, as a whole."""

import torch

from nemodiff_train.config.config import Changes, TriModeConfig, differences
from nemodiff_train.config.precision import saved_precision
from nemodiff_train.model.checkpoint import Checkpoint

_FIXED = (
    "objective",
    "drafter",
    "peft",
    "mixed_precision",
    "optimizer.optimizer",
    "dataset._target_",
    "dataset.seq_length",
)
"""Settings, and sections, that a run keeps: its state or its samples have no meaning under others."""
_ARCHITECTURE = (
    "_target_", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "vocab_size", "normalization", "layernorm_epsilon", "qk_layernorm", "add_bias_linear",
    "add_qkv_bias", "gated_linear_unit", "position_embedding_type", "rotary_base", "rotary_percent", "rope_scaling",
    "share_embeddings_and_output_weights", "mask_token_id",
)  # fmt: skip
"""Settings of the section ``model`` that a run keeps: they decide what the model computes."""
_SCHEDULE = ("train.train_iters", "train.global_batch_size", "optimizer.lr", "optimizer.min_lr", "scheduler")


def changes(saved: Checkpoint, config: TriModeConfig) -> Changes:
    """Return the settings that differ from those that a run was saved with."""
    before = saved.run_config.get("requested_settings")
    changed: Changes = {
        "mixed_precision": (None, config.mixed_precision)
    }  # all that is known of a run from elsewhere
    if before:
        changed = differences(before, config.settings())
    if names := changed.get("mixed_precision"):
        # Without a name the precision is the one that the run began in, which may be named as well.
        old, new = (str(name or saved_precision(saved)).replace("-", "_") for name in names)
        if old == new:
            del changed["mixed_precision"]
        else:
            changed["mixed_precision"] = old, new
    return changed


def problems(config: TriModeConfig) -> list[str]:
    """Return the changes that a run cannot resume with, one line each."""
    saved = config.saved
    if saved is None:
        return []
    changed, steps = changes(saved, config), config.train.train_iters
    kept = [key for key in changed if _belongs(key, _FIXED) or _belongs(key.removeprefix("model."), _ARCHITECTURE)]
    lines = [
        f"{key} is {changed[key][1]}, but '{saved.iteration}' was saved with {changed[key][0]}; keep that, or start "
        f"another run with start_from={saved.path} output=NEW"
        for key in kept
    ]
    if "train.global_batch_size" in changed and config.objective.block_schedule != "fixed":
        lines.append(
            "train.global_batch_size has changed, but objective.block_schedule counts steps by samples; keep "
            f"{changed['train.global_batch_size'][0]}"
        )
    if steps is not None and steps < saved.step:
        lines.append(f"train.train_iters={steps}, but '{saved.path}' is at step {saved.step}; use more steps")
    return lines


def description(saved: Checkpoint, config: TriModeConfig) -> str:
    """Return one line on what has changed for a run that resumes from ``saved``."""
    changed = changes(saved, config)
    if not changed:
        return f"resumes from step {saved.step} with the settings it was saved with"
    listed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    rebased = any(_belongs(key, _SCHEDULE) for key in changed)
    schedule = f"; the learning rate is that of the new schedule at step {saved.step}" if rebased else ""
    return f"resumes from step {saved.step} with changed settings: {listed}{schedule}"


def samples_ahead(saved: Checkpoint, config: TriModeConfig) -> int:
    """Return the samples that a run has read beyond its steps times its global batch, which may have been larger."""
    file = saved.iteration / "train_state.pt"
    if not file.is_file():
        return 0
    consumed = int(torch.load(file, weights_only=True)["consumed_train_samples"])
    return max(0, consumed - saved.step * config.train.global_batch_size)


def _belongs(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
