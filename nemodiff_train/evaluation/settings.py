"""Modes and settings of an evaluation, the grid that each mode is decoded over, and what texts are scored with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.errors import UserError

_MOST_DRAWS = 1_000_000
"""Each scores the whole text once more; a thousand give three digits."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Modes and settings that an evaluation covers."""

    modes: tuple[str, ...] = ("ar", "diffusion", "linear")
    thresholds: tuple[float, ...] = ()
    """Thresholds besides that of the decoding settings, for the curve of accuracy against TPF."""
    block_sizes: tuple[int, ...] = ()
    """Block sizes besides that of the decoding settings; each is combined with each threshold."""
    batch_size: int = 32
    """Prompts decoded together."""
    chat: bool = False
    """Whether prompts are put into the tokenizer's chat template, as a user's message."""


def settings_of(
    mode: str, settings: DecodingSettings, evaluation_settings: EvaluationSettings
) -> list[DecodingSettings]:
    """Return all settings that a mode is decoded with: the grid, as far as the mode depends on it."""
    relevant = relevant_settings(mode, settings)
    sizes = {settings.block_size, *(evaluation_settings.block_sizes if "block_size" in relevant else ())}
    thresholds = {settings.threshold, *(evaluation_settings.thresholds if "threshold" in relevant else ())}
    return [
        replace(settings, block_size=size, threshold=threshold)
        for size in sorted(sizes)
        for threshold in sorted(thresholds)
    ]


def relevant_settings(mode: str, settings: DecodingSettings) -> tuple[str, ...]:
    """Name the settings that a mode's output or its forwards depend on."""
    names: tuple[str, ...] = ("max_new_tokens",)
    if mode != "ar":
        names += ("block_size",)
    if mode == "diffusion":
        names += ("policy", {"entropy": "entropy_bound", "fixed": "steps"}.get(settings.policy, "threshold"))
    names += {"tree": ("tree_nodes", "tree_width"), "oracle": ("search_budget",)}.get(mode, ())
    if settings.temperature:
        names += ("temperature", "top_k", "top_p", "seed")
    return names


def check_scoring(model: Mapping[str, Any], length: int, draws: int, seed: int) -> None:
    """Refuse what no text can be scored with.

    Args:
        model: Settings of a model, or what a checkpoint has of them: the mask token and the block size.
        length: Tokens per sample.
        draws: Noise draws per sample.
        seed: Seed of the noise.

    Raises:
        UserError: Names the value.
    """
    block_size = model.get("block_size", 1)
    if model.get("mask_token_id") is None:
        raise UserError(
            "this checkpoint has had no joint stage, so its diffusion bound is not defined; train it jointly first"
        )
    if not 1 <= draws <= _MOST_DRAWS:
        raise UserError(f"--draws is {draws}; use 1 to {_MOST_DRAWS:,}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; use 0 to {2**32 - 1:,}")
    if length < 2 or length % block_size:
        raise UserError(f"--length is {length}; use a multiple of the model's block size {block_size}, 2 or more")
