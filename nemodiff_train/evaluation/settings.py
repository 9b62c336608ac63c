"""Modes and settings of an evaluation, and the grid that each mode is decoded over."""

from dataclasses import dataclass, replace

from nemodiff_train.decoding.generation import DecodingSettings


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


def settings_of(mode: str, settings: DecodingSettings, covered: EvaluationSettings) -> list[DecodingSettings]:
    """Return all settings that a mode is decoded with: the grid, as far as the mode depends on it."""
    relevant = relevant_settings(mode, settings)
    sizes = {settings.block_size, *(covered.block_sizes if "block_size" in relevant else ())}
    thresholds = {settings.threshold, *(covered.thresholds if "threshold" in relevant else ())}
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
