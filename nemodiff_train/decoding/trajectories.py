"""Trajectories of blocks whose text is known: the states that the trained sampler learns from, and is tested on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemodiff_train.decoding.diffusion import select_by_threshold
from nemodiff_train.decoding.generation import Generation
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.decoding.session import Session
from nemodiff_train.sampler.features import SlotHistory
from nemodiff_train.sampler.training import States

ConfidenceFunction = Callable[[Tensor], Tensor]
"""Probabilities [rows, block] that tokens are right, of features [rows, block, features]."""


@dataclass(frozen=True)
class ReferenceBlock:
    """A block of a text that the model has written."""

    context: list[int]
    """Tokens before it."""
    tokens: list[int]
    """The block's tokens: fewer than a block where a stop token ends them."""
    known: int
    """Number of these that decoding knows before its first forward over the block."""


@dataclass(frozen=True)
class Trajectories:
    """The states of some blocks on their way from masks to text, and what they took."""

    states: States
    forwards: int
    """Denoising forwards of all blocks."""
    tokens: int
    """Tokens that were to be found."""
    wrong: int
    """Those of them that a forward would have unmasked with another token than the reference's."""


def reference_blocks(
    prompt: Sequence[int],
    generation: Generation,
    block_size: int,
    *,
    blocks_from_text_start: bool,
    known_first_token: bool,
) -> list[ReferenceBlock]:
    """Cut a text into the blocks that block diffusion would decode it in.

    A last block that the limit on new tokens has cut is left out: nobody knows what belongs to its end.

    Args:
        prompt: Token ids.
        generation: What the model has written after it.
        block_size: Positions of a block.
        blocks_from_text_start: Blocks are counted from the start of the text, as block-causal models have them.
        known_first_token: The text before a block gives its first token.
    """
    text = [*prompt, *generation.tokens]
    first = len(prompt) // block_size * block_size if blocks_from_text_start else len(prompt)
    blocks = []
    for start in range(first, len(text), block_size):
        tokens = text[start : start + block_size]
        known = max(len(prompt) - start, int(known_first_token and start > 0), 0)
        complete = len(tokens) == block_size or tokens[-1] in generation.settings.stop_token_ids
        if complete and known < len(tokens):
            blocks.append(ReferenceBlock(text[:start], tokens, known))
    return blocks


@torch.no_grad()
def record(
    model: list[GPTModel],
    blocks: Sequence[ReferenceBlock],
    block_size: int,
    confidence: ConfidenceFunction | None,
    thresholds: Tensor,
) -> Trajectories:
    """Decode blocks under a sampler's decisions, with its mistakes put right.

    A slot that is unmasked gets the reference's token, whatever the forward gave it, so that all that is visible is
    right in every state: which tokens are right stays known to the end, and a block takes as many forwards as
    decoding would.  Nothing is unmasked after a text's end, where every token is wrong.

    Args:
        model: In evaluation mode: this pipeline rank's chunks.
        blocks: At least one.
        block_size: Positions of a block.
        confidence: Of each slot's token; the best slot of a row is always unmasked. None for an oracle, which unmasks
            every right token and no other.
        thresholds: [blocks] probability from which a slot is unmasked.
    """
    longest = max(len(block.context) for block in blocks)
    config = PipelineRunner(model).config
    session = Session(model, len(blocks), longest + block_size, config.mask_token_id)
    blocks_from_text_start = config.clean_attention == "block_causal"
    if longest:
        session.prefill([block.context for block in blocks], block_size if blocks_from_text_start else None)
    reference = torch.full((len(blocks), block_size), -1)
    known = torch.zeros(reference.shape, dtype=torch.bool)
    for row, block in enumerate(blocks):
        reference[row, : len(block.tokens)] = torch.tensor(block.tokens)
        known[row, : block.known] = True
    reference, known, thresholds = (values.to(session.device) for values in (reference, known, thresholds))
    tokens = torch.where(known, reference, session.masks(*reference.shape))
    history, states, forwards, wrong = SlotHistory(tokens), [], 0, 0
    while len(rows := (~known & (reference >= 0)).any(1).cpu().nonzero()[:, 0]):
        # Blocks [rows, block] that have masks left; logits, the most probable tokens, and their features.
        before, target, masked = tokens[rows], reference[rows], ~known[rows]
        logits = session.forward(before, rows, "denoise", causal=False)
        guess = logits.argmax(-1)
        features = history.observe(rows, logits, guess, before, masked)
        states.append(States(features.cpu(), masked.cpu(), (guess == target).cpu()))
        # Slots [rows, block] that reach the threshold.
        probability = (guess == target).float() if confidence is None else confidence(features)
        unmask = select_by_threshold(probability, masked, thresholds[rows, None])
        wrong += int((unmask & (guess != target) & (target >= 0)).sum())
        forwards += len(rows)
        # Nothing after the text's end is unmasked; a row without another slot to unmask gets its first one.
        unmask &= target >= 0
        first = masked & (masked.cumsum(1) == 1)
        unmask |= first & ~unmask.any(1, keepdim=True)
        tokens[rows] = torch.where(unmask, target, before)
        known[rows] |= unmask
    count = sum(len(block.tokens) - block.known for block in blocks)
    return Trajectories(States.joined(states), forwards, count, wrong)
