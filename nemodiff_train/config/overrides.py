"""Overrides from the command line: ``section.field=value`` in Hydra's syntax, checked against the declared type."""

import functools
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, cast

from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.ranges import check_range
from nemodiff_train.config.schedule import FRACTION_OF_STEPS
from nemodiff_train.errors import UserError, nearest
from nemodiff_train.schema import check_type, declared_type

_WITHOUT_EFFECT = {
    "it follows from the section objective": ("model.noisy_views", "model.largest_block"),
    "set objective.block_size": ("model.block_size",),
    "set objective.clean_attention": ("model.clean_attention",),
    "set objective.shift": ("model.shift",),
    "set objective.mask_token": ("model.mask_token_id",),
    "it follows from dataset.seq_length and the objective's views": ("model.seq_length",),
    "every run needs it as it is": (
        "model.calculate_per_token_loss", "ddp.average_in_collective", "train.check_optimizer_step_success",
        "checkpoint.custom_manager_class", "dist.lazy_mpu_init",
    ),
    "resilience.on_non_finite decides": (
        "ddp.check_for_nan_in_grad", "rerun_state_machine.check_for_nan_in_loss",
    ),
    "SIGTERM and SIGUSR1 end every run": ("train.exit_signal", "train.exit_signal_handler"),
    "set resilience.keep_every": ("checkpoint.save_retain_interval",),
    "use 'nemodiff convert export'": ("checkpoint.also_save_hf_checkpoint", "checkpoint.hf_*"),
    "run_config.yaml of every checkpoint holds the configuration": (
        "model.config_logger_dir", "optimizer.config_logger_dir",
    ),
    "the attention is this package's, which communicates in its own way": (
        "model.cp_comm_type", "model.hierarchical_context_parallel_sizes",
    ),
    "models that ModelOpt has quantized are not trained": ("model.restore_modelopt_state",),
    "it follows from the machine": ("dist.distributed_backend",),
    "Bridge computes it from the schedule's steps": (
        "scheduler.lr_warmup_steps", "scheduler.lr_decay_steps", "scheduler.wd_incr_steps",
        "scheduler.wsd_decay_steps",
    ),
    "no code of this version of Megatron and Bridge reads it": (
        "model.apply_residual_connection_post_layernorm", "model.use_inference_optimized_layers",
        "model.hf_model_revision", "ddp.use_custom_fsdp", "tokenizer.vocab_extra_ids",
        "checkpoint.dist_ckpt_save_pre_mcore_014", "train.step_batch_size_schedule",
        "train.gpu_sniff_test_interval", "checkpoint.save_params_interval",
        "checkpoint.save_activations_interval", "checkpoint.save_tokens_per_expert_interval",
        "checkpoint.save_wgrads_interval", "checkpoint.save_dgrads_interval",
    ),
    "the model has no experts": ("model.moe_*", "model.num_moe_*", "model.expert_*"),
    "the model has attention layers only": ("model.mamba_*", "model.linear_*"),
    "the layers of the model are alike": ("model.heterogeneous_*", "model.hetereogenous_*"),
    "the checkpoint's config.json decides what is computed": (
        "model.window_*", "model.dsa_*", "model.experimental_attention_variant*", "model.multi_latent_attention*",
        "model.softmax_scale*", "model.softmax_type*", "model.no_rope_freq*", "model.mrope_*", "model.rope_scal*",
        "model.yarn_*", "model.rotary_scaling*", "model.seq_len_interpolation_factor*", "model.qk_clip*",
        "model.use_mup*", "model.mup_*",
    ),
    "the model predicts one token per position": ("model.mtp_*",),
    "the checkpoint fixes the vocabulary size": (
        "tokenizer.vocab_size*", "tokenizer.padded_vocab_*", "tokenizer.use_tokenizer_vocab_*",
    ),
    "checkpoints are of one kind here": ("checkpoint.non_persistent_*", "checkpoint.replication*"),
    "the tokenizer is a Hugging Face directory": (
        "tokenizer.vocab_file*", "tokenizer.merge_file*", "tokenizer.metadata_path*", "tokenizer.special_tokens*",
        "tokenizer.tiktoken_*", "tokenizer.null_tokenizer_*", "tokenizer.sp_tokenizer_*", "tokenizer.image_tag_*",
        "tokenizer.tokenizer_sentencepiece_*", "tokenizer.tokenizer_prompt_format*",
        "tokenizer.force_system_message*", "tokenizer.make_vocab_size_divisible_by*",
        "tokenizer.tensor_model_parallel_size*", "tokenizer.rank*",
    ),
}  # fmt: skip
"""Settings that would change nothing here, by the reason; a name may end in a wildcard."""
_PRECISION = {field.name for field in fields(MixedPrecisionConfig)}


def override(config: TriModeConfig, overrides: Mapping[str, str]) -> TriModeConfig:
    """Set fields of a configuration.

    Args:
        config: Changed in place.
        overrides: ``section.field`` to its new value in Hydra's syntax.

    Raises:
        UserError: Unknown key, with the nearest match, or a value that does not fit.
    """
    for key in overrides:
        if (remedy := without_effect(_without_sign(key))) is not None:
            raise UserError(f"{key} has no effect here: {remedy}")
        if _section_of(key) == "peft":  # an object that can be called, which Hydra leaves out
            raise UserError(f"{key} cannot be overridden; the recipe's arguments, such as lora_rank, say what adapts")
    for steps, fraction in FRACTION_OF_STEPS.items():  # steps on the command line replace a recipe's fraction
        if f"scheduler.{steps}" in overrides and f"scheduler.{fraction}" not in overrides:
            setattr(config.scheduler, fraction, None)
        if f"scheduler.{fraction}" in overrides and f"scheduler.{steps}" not in overrides:
            setattr(config.scheduler, steps, 0 if steps == "lr_warmup_iters" else None)
    before = {key: _look_up(config, key) for key in map(_without_sign, overrides)}
    for section, keys in groupby(sorted(overrides, key=_section_of), _section_of):
        node = getattr(config, section, None)
        # Only the sections that change: Hydra takes a third of a second for all.
        part, start = (node, len(section) + 1) if is_dataclass(node) else (config, 0)
        words = [_word(config, key, overrides[key], start) for key in keys]
        try:
            process_config_with_overrides(cast(Any, part), cli_overrides=words)
        except (OverridesError, TypeError, ValueError) as error:
            raise UserError(f"cannot apply the overrides: {str(error).splitlines()[-1].strip()}") from None
    for key, old in before.items():
        _check_kind(key, old, _look_up(config, key))
        check_type(config, key)
        check_range(key, _look_up(config, key))
    return config


def _without_sign(key: str) -> str:
    """Return a key without what Hydra takes before one to add or remove it, such as ``+``."""
    return key.lstrip("+~")


def _section_of(key: str) -> str:
    return _without_sign(key).partition(".")[0]


def without_effect(key: str) -> str | None:
    """Return why setting a field would change nothing, or None for a field that something reads.

    Args:
        key: ``section.field``.
    """
    section, _, name = key.partition(".")
    if section in ("model", "optimizer", "ddp") and name in _PRECISION:  # Bridge copies each over its namesake
        return "set mixed_precision in the recipe, which decides on all of these"
    for reason, patterns in _WITHOUT_EFFECT.items():
        if any(fnmatchcase(key, pattern) for pattern in patterns):
            return reason
    return None


def _look_up(config: TriModeConfig, key: str) -> object:
    """Walk a dotted key and return its value, or that of the first part that is not a section."""
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


def _word(config: TriModeConfig, key: str, value: str, start: int) -> str:
    """Return an override as Hydra reads it, without the ``start`` characters of the section before its field.

    The value of a field that holds text is quoted: Hydra reads 17 as a number, and 99,1,0 as a choice of three.
    """
    path = _without_sign(key)
    word = key.removesuffix(path) + path[start:]
    section, _, name = path.rpartition(".")
    node = functools.reduce(lambda owner, name: getattr(owner, name, None), section.split("."), cast(object, config))
    hint = declared_type(type(node), name) if is_dataclass(node) else None
    if hint not in (str, str | None) or value in ("", "null") or value[0] in "'\"[{":
        return f"{word}={value}"
    # In Hydra's quotes a backslash escapes a quote, and is written twice before one.
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), value)
    return f"{word}='{escaped}'"


def _check_kind(key: str, old: object, new: object) -> None:
    """Refuse text where the recipe had a number or a truth value, and nothing where it had something.

    Hydra accepts anything.
    """
    if isinstance(old, bool | int | float) and not isinstance(new, bool | int | float):
        expected = "true or false" if isinstance(old, bool) else "a number"
        raise UserError(f"{key}={new} is not {expected}; its value was {old}")
    if new == "" and old != "":
        raise UserError(f"{key} is empty; name what it is, or leave it out")
