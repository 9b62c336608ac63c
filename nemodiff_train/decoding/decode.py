"""Decode a batch of prompts in one of the modes."""

from collections.abc import Callable, Sequence

from megatron.core.models.gpt import GPTModel

from nemodiff_train.decoding.ar import decode_ar
from nemodiff_train.decoding.diffusion import decode_diffusion
from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.infill import Filled, infill, revise
from nemodiff_train.decoding.linear import decode_linear
from nemodiff_train.decoding.oracle import decode_oracle
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.decoding.quadratic import decode_quadratic
from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.decoding.session import Session, check_prompts
from nemodiff_train.decoding.tree import decode_tree
from nemodiff_train.errors import UserError, nearest
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.objective.drafts import DRAFT_KINDS, DraftKind
from nemodiff_train.runtime import init_runtime

MODES: dict[str, Callable[[Session, Sequence[Sequence[int]], TokenSampler], list[Generation]]] = {
    "ar": decode_ar,
    "diffusion": decode_diffusion,
    "linear": decode_linear,
    "tree": decode_tree,
    "quadratic": decode_quadratic,
    "oracle": decode_oracle,
}

DRAFTED = ("linear", "tree")
"""Modes in which a drafter drafts."""
WITHOUT_POLICY = ("ar", "linear", "tree", "quadratic", "oracle")
"""Modes in which no policy decides what to unmask."""


def check_mode(config: TriModeModelProvider, mode: str, kind: DraftKind = DRAFT_KINDS["nemotron"]) -> None:
    """Refuse a mode that does not exist, or in which a model cannot decode.

    Args:
        config: The model's configuration.
        mode: Name of the mode.
        kind: What the drafts of its drafter look like.

    Raises:
        UserError: Names the mode and what to do.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}'; known: {', '.join(MODES)}.{nearest(mode, MODES)}")
    needs_mask = mode != "ar" and not (mode in DRAFTED and kind.uniform_noise)
    if needs_mask and config.mask_token_id is None:
        drafted = " or a drafter of kind uno" if mode in DRAFTED else ""
        raise UserError(
            f"mode '{mode}' needs a mask token{drafted}, and this checkpoint has had no joint stage; use ar"
        )
    if mode != "diffusion" and config.clean_attention == "block_causal":
        raise UserError(
            f"mode '{mode}' needs a causal clean half, and this checkpoint was trained with "
            "objective.clean_attention=block_causal; use diffusion"
        )


def decode(
    model: GPTModel | list[GPTModel],
    prompts: Sequence[Sequence[int]],
    mode: str,
    settings: DecodingSettings,
    request_ids: Sequence[int] | None = None,
) -> tuple[list[Generation], Session]:
    """Continue every prompt.

    Args:
        model: A Megatron GPT model made by ``TriModeModelProvider``, in evaluation mode, or this pipeline rank's
            model chunks in order. All ranks that share a model make the same calls.
        prompts: Token ids; rows may differ in length.
        mode: One of :data:`MODES`.
        settings: How to decode.
        request_ids: Number of each row in its task, which its draws depend on; 0, 1, ... by default.

    Returns:
        One generation per prompt, and the session, which has counted the forwards.

    Raises:
        UserError: Unknown mode, no prompts, or a model that cannot decode in this mode.
    """
    runner = PipelineRunner(model)
    config = runner.config
    check_mode(config, mode, runner.draft_kind)
    check_prompts(prompts, config.vocab_size)
    longest = max(map(len, prompts)) + settings.max_new_tokens
    _check_positions(config, longest)
    block_size = settings.block_size
    extra = {"quadratic": block_size**2, "tree": max(block_size, settings.tree_nodes)}.get(mode, block_size)
    session = Session(model, len(prompts), longest + extra, config.mask_token_id)
    sampler = TokenSampler(settings, range(len(prompts)) if request_ids is None else request_ids)
    with init_runtime().without_device_rewriting():
        return MODES[mode](session, prompts, sampler), session


def fill(
    model: GPTModel | list[GPTModel],
    text: Sequence[int],
    settings: DecodingSettings,
    start: int | None = None,
    min_probability: float = 0.0,
) -> tuple[Filled, Session]:
    """Fill the masks of one text, or decode its improbable tokens again.

    Args:
        model: As for :func:`decode`.
        text: Token ids; with ``start`` None, masks among them.
        settings: Block size and policy.
        start: Position where a draft begins that is to be revised; see
            :func:`~nemodiff_train.decoding.infill.revise`.
        min_probability: Probability below which a token of the draft is decoded again.

    Returns:
        The filled text, and the session, which has counted the forwards.

    Raises:
        UserError: Nothing to fill, or a model that cannot decode blocks.
    """
    config = PipelineRunner(model).config
    check_mode(config, "linear")  # infilling needs the same: a mask token, and a causal clean half
    check_prompts([text], config.vocab_size)
    _check_positions(config, len(text))
    session = Session(model, 1, len(text) + settings.block_size, config.mask_token_id)
    sampler = TokenSampler(settings, [0])
    with init_runtime().without_device_rewriting():
        if start is None:
            return infill(session, text, sampler), session
        return revise(session, text, start, min_probability, sampler), session


def position_limit(config: TriModeModelProvider) -> int | None:
    """Return the number of positions of a model; None where its configuration names none."""
    limit: int | None = config.hf_config.get("max_position_embeddings")
    return limit


def _check_positions(config: TriModeModelProvider, longest: int) -> None:
    limit = position_limit(config)
    if limit and longest > limit:
        raise UserError(
            f"the longest prompt and the new tokens are {longest} positions, but the model has {limit}; "
            "shorten the prompt, or lower max_new_tokens (--max-new-tokens)"
        )
