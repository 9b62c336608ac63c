"""Overrides from the command line: ``section.field=value`` in Hydra's syntax, checked against the declared type."""

import functools
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import Any, cast

from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.ranges import check_range
from nemodiff_train.config.schedule import SHARES
from nemodiff_train.errors import UserError, nearest
from nemodiff_train.schema import check_type, declared_type

_FROM_OBJECTIVE = "it follows from the section objective"
_OURS = "every run needs it as it is"
_BY_PRECISION = "set mixed_precision in the recipe, which decides on all of these"
_SAVED = "run_config.yaml of every checkpoint holds the configuration"
_OWN_ATTENTION = "the attention is this package's, which communicates in its own way"
_BY_BRIDGE = "Bridge computes it from the schedule's steps"
_WITHOUT_EFFECT = {
    # Settings that something else decides, and what.
    "train.rampup_batch_size": "Megatron-Core no longer ramps batches up; use train.global_batch_size alone",
    "model.seq_length": "it follows from dataset.seq_length and the objective's views",
    "model.noisy_views": _FROM_OBJECTIVE,
    "model.block_size": "set objective.block_size",
    "model.largest_block": _FROM_OBJECTIVE,
    "model.clean_attention": "set objective.clean_attention",
    "model.shift": "set objective.shift",
    "model.mask_token_id": "set objective.mask_token",
    "model.calculate_per_token_loss": _OURS,
    "ddp.average_in_collective": _OURS,
    "ddp.check_for_nan_in_grad": "resilience.on_non_finite decides",
    "rerun_state_machine.check_for_nan_in_loss": "resilience.on_non_finite decides",
    "train.check_optimizer_step_success": _OURS,
    "train.exit_signal": "SIGTERM and SIGUSR1 end every run",
    "train.exit_signal_handler": "SIGTERM and SIGUSR1 end every run",
    "checkpoint.custom_manager_class": _OURS,
    "checkpoint.also_save_hf_checkpoint": "use 'nemodiff convert export'",
    "checkpoint.save_retain_interval": "set resilience.keep_every",
    "dist.lazy_mpu_init": _OURS,
    "model.config_logger_dir": _SAVED,
    "optimizer.config_logger_dir": _SAVED,
    "model.cp_comm_type": _OWN_ATTENTION,
    "model.hierarchical_context_parallel_sizes": _OWN_ATTENTION,
    "model.restore_modelopt_state": "models that ModelOpt has quantized are not trained",
    "dist.distributed_backend": "it follows from the machine",
    "scheduler.lr_warmup_steps": _BY_BRIDGE,
    "scheduler.lr_decay_steps": _BY_BRIDGE,
    "scheduler.wd_incr_steps": _BY_BRIDGE,
    "scheduler.wsd_decay_steps": _BY_BRIDGE,
    **dict.fromkeys(
        (
            "model.apply_residual_connection_post_layernorm",
            "model.use_inference_optimized_layers",
            "model.hf_model_revision",
            "ddp.use_custom_fsdp",
            "tokenizer.vocab_extra_ids",
            "checkpoint.dist_ckpt_save_pre_mcore_014",
            "train.step_batch_size_schedule",
            "train.gpu_sniff_test_interval",
            "checkpoint.save_params_interval",
            "checkpoint.save_activations_interval",
            "checkpoint.save_tokens_per_expert_interval",
            "checkpoint.save_wgrads_interval",
            "checkpoint.save_dgrads_interval",
        ),
        "no code of this version of Megatron and Bridge reads it",
    ),
}
_PRECISION = {field.name for field in fields(MixedPrecisionConfig)}
_OF_OTHER_KINDS = {
    **dict.fromkeys(("model.moe_", "model.num_moe_", "model.expert_"), "the model has no experts"),
    **dict.fromkeys(("model.mamba_", "model.linear_"), "the model has attention layers alone"),
    **dict.fromkeys(("model.heterogeneous_", "model.hetereogenous_"), "the layers of the model are alike"),
    **dict.fromkeys(
        (
            "model.window_", "model.dsa_", "model.experimental_attention_variant", "model.multi_latent_attention",
            "model.softmax_scale", "model.softmax_type", "model.no_rope_freq", "model.mrope_", "model.rope_scal",
            "model.yarn_", "model.rotary_scaling", "model.seq_len_interpolation_factor", "model.qk_clip",
            "model.use_mup", "model.mup_",
        ),
        "the checkpoint's config.json decides what is computed",
    ),
    "checkpoint.hf_": "use 'nemodiff convert export'",
    "model.mtp_": "the model predicts one token per position",
    **dict.fromkeys(
        ("tokenizer.vocab_size", "tokenizer.padded_vocab_", "tokenizer.use_tokenizer_vocab_"),
        "the checkpoint decides on its rows",
    ),
    **dict.fromkeys(
        ("checkpoint.non_persistent_", "checkpoint.replication"), "checkpoints are of one kind here"
    ),
    **dict.fromkeys(
        (
            "tokenizer.vocab_file", "tokenizer.merge_file", "tokenizer.metadata_path", "tokenizer.special_tokens",
            "tokenizer.tiktoken_", "tokenizer.null_tokenizer_", "tokenizer.sp_tokenizer_", "tokenizer.image_tag_",
            "tokenizer.tokenizer_sentencepiece_", "tokenizer.tokenizer_prompt_format",
            "tokenizer.force_system_message", "tokenizer.make_vocab_size_divisible_by",
            "tokenizer.tensor_model_parallel_size", "tokenizer.rank",
        ),
        "the tokenizer is a Hugging Face directory",
    ),
}  # fmt: skip
"""Beginnings of settings that belong to kinds of models, or of checkpoints, that there are none of here."""


def override(config: TriModeConfig, overrides: Mapping[str, str]) -> TriModeConfig:
    """Set fields of a configuration.

    Args:
        config: Changed in place.
        overrides: ``section.field`` to its new value in Hydra's syntax.

    Raises:
        UserError: Unknown key, with the nearest match, or a value that does not fit.
    """
    for key in overrides:
        if (remedy := without_effect(key.lstrip("+~"))) is not None:
            raise UserError(f"{key} has no effect here: {remedy}")
        if _section_of(key) == "peft":  # an object that can be called, which Hydra leaves out
            raise UserError(f"{key} cannot be overridden; the recipe's arguments, such as lora_rank, say what adapts")
    for steps, share in SHARES.items():  # steps on the command line take the place of a recipe's share
        if f"scheduler.{steps}" in overrides and f"scheduler.{share}" not in overrides:
            setattr(config.scheduler, share, None)
        if f"scheduler.{share}" in overrides and f"scheduler.{steps}" not in overrides:
            setattr(config.scheduler, steps, 0 if steps == "lr_warmup_iters" else None)
    before = {key: _look_up(config, key.lstrip("+~")) for key in overrides}
    for section, keys in groupby(sorted(overrides, key=_section_of), _section_of):
        node = getattr(config, section, None)
        # Only the sections that change: Hydra takes a third of a second for all.
        part, start = (node, len(section) + 1) if is_dataclass(node) else (config, 0)
        words = [f"{_cut(key, start)}={_as_hydra_reads_it(config, key, overrides[key])}" for key in keys]
        try:
            process_config_with_overrides(cast(Any, part), cli_overrides=words)
        except (OverridesError, TypeError, ValueError) as error:
            raise UserError(f"cannot apply the overrides: {str(error).splitlines()[-1].strip()}") from None
    for key, old in before.items():
        _check_kind(key, old, _look_up(config, key.lstrip("+~")))
        check_type(config, key.lstrip("+~"))
        check_range(key.lstrip("+~"), _look_up(config, key.lstrip("+~")))
    return config


def _section_of(key: str) -> str:
    return key.lstrip("+~").partition(".")[0]


def _cut(key: str, start: int) -> str:
    """Return a key without the ``start`` characters of its section, but with Hydra's signs before it."""
    name = key.lstrip("+~")
    return key[: len(key) - len(name)] + name[start:]


def without_effect(key: str) -> str | None:
    """Return why setting a field would change nothing, or None for a field that something reads.

    Args:
        key: ``section.field``.
    """
    if reason := _WITHOUT_EFFECT.get(key):
        return reason
    section, _, name = key.partition(".")
    if section in ("model", "optimizer", "ddp") and name in _PRECISION:  # Bridge copies each over its namesake
        return _BY_PRECISION
    return next((reason for start, reason in _OF_OTHER_KINDS.items() if key.startswith(start)), None)


def _look_up(config: TriModeConfig, key: str) -> object:
    """Walk a dotted key and return its value, or that of the first part that is not a section.

    Raises:
        UserError: Names the first part that does not exist.
    """
    node: Any = config
    walked: list[str] = []
    for part in key.split("."):
        known = list(node) if isinstance(node, dict) else [name for name in vars(node) if not name.startswith("_")]
        if part not in known:
            section = ".".join(walked) or "the configuration"
            raise UserError(f"unknown key '{key}': {section} has no '{part}'.{nearest(part, known)}")
        node = node[part] if isinstance(node, dict) else getattr(node, part)
        walked.append(part)
        if node is None or isinstance(node, (str, int, float, list, tuple)):
            break
    return node


def _as_hydra_reads_it(config: TriModeConfig, key: str, value: str) -> str:
    """Quote the value of a field that holds text: Hydra reads 17 as a number, and 99,1,0 as a choice of three."""
    section, _, name = key.lstrip("+~").rpartition(".")
    node = functools.reduce(lambda owner, name: getattr(owner, name, None), section.split("."), cast(object, config))
    hint = declared_type(type(node), name) if is_dataclass(node) else None
    if hint not in (str, str | None) or value in ("", "null") or value[0] in "'\"[{":
        return value
    # In Hydra's quotes a backslash escapes a quote, and is written twice before one.
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _check_kind(key: str, old: object, new: object) -> None:
    """Refuse text where the recipe had a number or a truth value, and nothing where it had something.

    Hydra accepts anything.
    """
    if isinstance(old, bool | int | float) and not isinstance(new, bool | int | float):
        expected = "true or false" if isinstance(old, bool) else "a number"
        raise UserError(f"{key}={new} is not {expected}; its value was {old}")
    if new == "" and old != "":
        raise UserError(f"{key} is empty; name what it is, or leave it out")
