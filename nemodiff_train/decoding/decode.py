"""Decode a batch of prompts in one of the modes."""

from collections.abc import Callable, Sequence
from typing import Any

from nemodiff_train.decoding.ar import decode_ar
from nemodiff_train.decoding.diffusion import decode_diffusion
from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.linear import decode_linear
from nemodiff_train.decoding.session import Session, check_prompts
from nemodiff_train.errors import UserError, nearest

Decoder = Callable[[Session, Sequence[Sequence[int]], DecodingSettings], list[Generation]]

MODES: dict[str, Decoder] = {"ar": decode_ar, "diffusion": decode_diffusion, "linear": decode_linear}


def check_mode(config: Any, mode: str) -> None:
    """Refuse a mode that does not exist, or that a model cannot decode in.

    Args:
        config: The model's ``TriModeModelProvider``.

    Raises:
        UserError: Names the mode and what to do.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}'; known: {', '.join(MODES)}.{nearest(mode, MODES)}")
    if mode != "ar" and config.mask_token_id is None:
        raise UserError(f"mode '{mode}' needs a mask token, and this checkpoint has had no joint stage; use ar")
    if mode != "diffusion" and config.clean_half == "block_causal":
        raise UserError(
            f"mode '{mode}' needs a causal clean half, and this checkpoint was trained with "
            "objective.clean_half=block_causal; use diffusion"
        )


def decode(
    model: Any, prompts: Sequence[Sequence[int]], mode: str, settings: DecodingSettings
) -> tuple[list[Generation], Session]:
    """Continue every prompt.

    Args:
        model: A Megatron GPT model made by ``TriModeModelProvider``, in evaluation mode.
        prompts: Token ids; rows may differ in length.
        mode: One of :data:`MODES`.

    Returns:
        One generation a prompt, and the session, which has counted the forwards.

    Raises:
        UserError: Unknown mode, no prompts, or a model that cannot decode in this mode.
    """
    check_mode(model.config, mode)
    check_prompts(prompts)
    capacity = max(map(len, prompts)) + settings.max_new_tokens + settings.block_size
    session = Session(model, len(prompts), capacity, model.config.mask_token_id)
    return MODES[mode](session, prompts, settings), session
