"""The training sample of a pack of conversations: answers alone are learned, each on a grid of blocks of its own.

Decoding prefills the prompt and opens its first block where the prompt ends, whatever its length.  So does a sample:

======== ================================================== ============= ============ ==================
place    blocks                                             AR target     noise        seen by later text
======== ================================================== ============= ============ ==================
prompt   a grid of its own                                  none          never        yes
answer   a grid that starts with the answer                 every token   as drawn     yes
padding  what the answer's last block lacks                 none          always       never
======== ================================================== ============= ============ ==================

Padding stands for the places of a block that a decoder has behind the end of an answer: always masked in the
noisy half, so that nothing tells the model how long the answer is going to be, and without loss.  It sees what its
conversation's text sees; its clean half is seen by nothing, and takes no positions from later turns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.objective.sample import Clean, SampleMaker


@dataclass(frozen=True, kw_only=True)
class ConversationMaker(SampleMaker):
    """Turns packs of conversations into training samples."""

    length: int
    """L: places of a sample. What does not fit is cut off."""
    padding_id: int = 0
    """Any token; the clean half holds it at places that nothing else sees."""

    def clean(self, sample: Mapping[str, Tensor], block_size: int) -> Clean:
        """Lay a pack out.

        Args:
            sample: ``tokens`` of the conversations end to end, and for each of their turns ``lengths``, ``answers``
                (whether the model says it) and ``conversations`` (0, 1, ... without gaps).
            block_size: Positions of a block.
        """
        lengths, answers, conversations = sample["lengths"], sample["answers"], sample["conversations"]
        grid = block_size if self.objective.noisy_views else 1  # AR has no blocks to fill
        runs, turn, padding = _runs(lengths, answers, grid, self.length)
        place = _within(runs)
        tokens = torch.full((self.length,), self.padding_id)
        tokens[~padding] = sample["tokens"][: int((~padding).sum())]
        talk = conversations[turn]
        document = torch.where(padding, -1 - talk, talk)
        answer = answers[turn] & ~padding
        in_grid = place + torch.where(padding & answers[turn], lengths[turn], 0)
        in_grid = torch.where(runs == 2 * len(lengths), place, in_grid)
        opens = in_grid % block_size == 0
        before = lengths.cumsum(0) - lengths
        first = torch.searchsorted(conversations, conversations)
        position = torch.where(padding, lengths[turn], 0) + place + (before - before[first])[turn]
        said_next = torch.cat([answer[1:] & (document[1:] == document[:-1]), torch.zeros(1, dtype=torch.bool)])
        return Clean(
            tokens=tokens,
            labels=tokens.roll(-1),
            segment_ids=torch.stack([document, opens.cumsum(0) - 1, position]).int(),
            targets=said_next,
            maskable=answer,
            sequences=talk,
            padding=padding,
        )


def _runs(lengths: Tensor, answers: Tensor, grid: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turns, the padding behind each, and what is left over, as runs of places.

    Returns:
        [length] each: number of the run (turn k is run 2k, its padding 2k + 1), of the turn, whether it is padding.
    """
    padding = torch.where(answers, -lengths % grid, 0)
    counts = torch.stack([lengths, padding], 1).flatten()
    left = max(0, length - int(counts.sum()))
    counts = torch.cat([counts, torch.tensor([left])])
    runs = torch.repeat_interleave(torch.arange(len(counts)), counts)[:length]
    return runs, (runs // 2).clamp(max=len(lengths) - 1), (runs % 2 == 1) | (runs == 2 * len(lengths))


def _within(runs: Tensor) -> Tensor:
    """How many places of the same run come before each place."""
    return torch.arange(len(runs)) - torch.searchsorted(runs, runs)
