"""The training sample of a pack of conversations: answers alone are learned, each on its own grid of blocks.

Decoding prefills the prompt and opens its first block where the prompt ends, whatever its length.  So does a sample:

======== ================================================== ============= ============ ==================
segment  blocks                                             AR loss       noise        seen by later text
======== ================================================== ============= ============ ==================
prompt   its own grid                                       none          never        yes
answer   a grid that starts with the answer                 every token   as drawn     yes
padding  what the answer's last block lacks                 none          always       never
======== ================================================== ============= ============ ==================

Padding stands for the positions of a block that a decoder has after the end of an answer: always masked in the noisy
half, so that nothing tells the model how long the answer is going to be, and without loss.  It sees what its
conversation's text sees; its clean half is seen by nothing, and later turns do not count its positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.objective.sample import CleanHalf, SampleMaker


@dataclass(frozen=True, kw_only=True)
class ConversationMaker(SampleMaker):
    """Turns packs of conversations into training samples."""

    length: int
    """L: positions of a sample. What does not fit is cut off."""
    padding_id: int = 0
    """Any token; the clean half holds it at positions that nothing else sees."""

    def clean(self, sample: Mapping[str, Tensor], block_size: int) -> CleanHalf:
        """Lay a pack out.

        Args:
            sample: ``tokens`` of the conversations end to end, and per turn ``lengths``, ``answers`` (whether the
                model says it) and ``conversations`` (0, 1, ... without gaps).
            block_size: Positions per block.
        """
        lengths, answers, conversations = sample["lengths"], sample["answers"], sample["conversations"]
        grid = block_size if self.objective.noisy_views else 1  # AR has no blocks to fill
        # [L] each: segment, turn, whether it is padding, and index in the segment of each position.
        segment, turn, padding = _segments(lengths, answers, grid, self.length)
        in_segment = torch.arange(self.length) - torch.searchsorted(segment, segment)
        # [L] each: token, conversation, whether an answer, and document of each position.
        tokens = torch.full((self.length,), self.padding_id)
        tokens[~padding] = sample["tokens"][: int((~padding).sum())]
        conversation, answer = conversations[turn], answers[turn] & ~padding
        document = torch.where(padding, -1 - conversation, conversation)

        # Blocks: an answer's padding continues the answer's grid; the padding at the end of the pack has its own.
        after_answer = padding & answers[turn] & (segment != 2 * len(lengths))
        in_grid = in_segment + torch.where(after_answer, lengths[turn], 0)
        block = (in_grid % block_size == 0).cumsum(0) - 1

        # Position ids count the text of a conversation, from its first turn.
        before = lengths.cumsum(0) - lengths
        first_turn = torch.searchsorted(conversations, conversations)
        position_ids = in_segment + torch.where(padding, lengths[turn], 0) + (before - before[first_turn])[turn]

        next_is_answer = answer[1:] & (document[1:] == document[:-1])
        return CleanHalf(
            tokens=tokens,
            labels=tokens.roll(-1),
            segment_ids=torch.stack([document, block, position_ids]).int(),
            ar_loss_mask=torch.cat([next_is_answer, torch.zeros(1, dtype=torch.bool)]),
            maskable=answer,
            sequences=conversation,
            padding=padding,
        )


def _segments(lengths: Tensor, answers: Tensor, grid: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a sample into turns, the padding after each, and the padding at the end.

    Returns:
        [length] each: index of the segment (turn k is segment 2k, its padding 2k + 1), index of the turn, whether it
        is padding.
    """
    # [2 turns + 1] number of positions of each segment, the last one what is left of the sample.
    padding = torch.where(answers, -lengths % grid, 0)
    counts = torch.stack([lengths, padding], 1).flatten()
    left = max(0, length - int(counts.sum()))
    counts = torch.cat([counts, torch.tensor([left])])
    segment = torch.repeat_interleave(torch.arange(len(counts)), counts)[:length]
    turn = (segment // 2).clamp(max=len(lengths) - 1)
    return segment, turn, (segment % 2 == 1) | (segment == 2 * len(lengths))
