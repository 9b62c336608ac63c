"""The training sample: L tokens become (V + 1) L positions, ``[noisy views | clean]``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nemodiff_train.objective.config import ObjectiveConfig
from nemodiff_train.objective.noise import Key, draw_noise
from nemodiff_train.objective.schedule import block_size_at

Sample = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Clean:
    """The clean half of a training sample, and what noise may do to it; L places."""

    tokens: Tensor
    """[L] ids."""
    labels: Tensor
    """[L] the next tokens."""
    segment_ids: Tensor
    """[3, L] int32: document, block and position of each place."""
    targets: Tensor
    """[L] whether the next token is an AR target."""
    maskable: Tensor
    """[L] places that count, and may be masked."""
    sequences: Tensor | None = None
    """[L] number of the sequence that a place's noise level is drawn for; None where the sample is one."""
    padding: Tensor | None = None
    """[L] places behind an answer's end, which a decoder could only see masked; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class SampleMaker:
    """Turns samples of an AR data set into training samples."""

    objective: ObjectiveConfig
    mask_id: int = 0
    """Id of the mask token; unused in the AR stage."""
    batch_size: int = 1
    """Samples in a global batch."""
    document_end: int | None = None
    """Id of the token that ends a document, where documents are kept apart; None to ignore them."""
    restart_positions: bool = False
    """Positions restart with each document."""

    def make(self, sample: Mapping[str, Tensor], split: int, index: int) -> Sample:
        """Make the training sample of an AR sample.

        ============ ============================================ ===================================
        field        noisy views                                  clean half
        ============ ============================================ ===================================
        tokens       the tokens, masked places set to ``mask_id`` the tokens
        labels       the tokens (the next ones if shifted)        the next tokens
        loss_mask    w where masked, else 0                       1 where the token has an AR target
        position_ids 0 .. L-1, or restarting with documents       the same
        level        noise level t of the target
        slot         place of the target in its block, from 0
        ============ ============================================ ===================================

        and once, not once a view: ``segment_ids`` [3, L], the document, block and position of each place;
        ``maskable`` [L], places that count; ``index``.  ``alpha`` and the number of views are not in the
        weights: the loss applies them, so that both parts can be reported apart.

        Args:
            sample: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each [L].
            split: Number of the split; 0 is training.
            index: Index of the sample in its split.
        """
        block_size = block_size_at(self.objective, index // self.batch_size if split == 0 else None)
        clean = self.clean(sample, block_size)
        targets = clean.targets
        if self.objective.noisy_views and self.objective.clean_attention == "block_causal":
            targets = targets & _ends(clean.segment_ids[1], last=True)  # elsewhere the place could see it
        made = {
            "tokens": clean.tokens,
            "labels": clean.labels,
            "loss_mask": targets.float(),
            "position_ids": clean.segment_ids[2].long(),
            "segment_ids": clean.segment_ids,
            "maskable": clean.maskable,
            "index": torch.tensor(index),
        }
        if self.objective.noisy_views:
            made.update(self._with_noise(clean, made, Key(self.objective.seed, split, index), block_size))
        return made

    def clean(self, sample: Mapping[str, Tensor], block_size: int) -> "Clean":
        """The clean half of an AR sample.

        Args:
            sample: As :meth:`make` takes it.
            block_size: Positions of a block.
        """
        tokens, counts = sample["tokens"], sample["loss_mask"] > 0
        segment_ids = self._structure(tokens, block_size)
        return Clean(
            tokens=tokens,
            labels=sample["labels"],
            segment_ids=segment_ids,
            targets=counts & ~_ends(segment_ids[0], last=int(tokens[-1]) == self.document_end),
            maskable=counts,
        )

    def _structure(self, tokens: Tensor, block_size: int) -> Tensor:
        """[3, L] int32: number of the document, number of the block, position in the text."""
        place = torch.arange(len(tokens))
        ends = torch.zeros_like(place) if self.document_end is None else (tokens == self.document_end).long()
        document = ends.cumsum(0) - ends  # a document's last token belongs to it
        in_document = place - torch.searchsorted(document, document)
        opens = in_document % block_size == 0
        position = in_document if self.restart_positions else place
        return torch.stack([document, opens.cumsum(0) - 1, position]).int()

    def _with_noise(self, clean: "Clean", made: Sample, key: Key, block_size: int) -> Sample:
        tokens, block = clean.tokens, clean.segment_ids[1]
        eligible, blocks = clean.maskable.numpy(), block.long().numpy()
        sequences = None if clean.sequences is None else clean.sequences.numpy()
        noise = draw_noise(key, eligible, blocks, self.objective, block_size, self.batch_size, sequences)
        masked, weight, level = (torch.from_numpy(each) for each in noise)
        targets, slot = tokens, torch.arange(len(block)) - torch.searchsorted(block, block)
        if self.objective.shift:
            # A block's first place would be predicted from a block it cannot see; decoding has it from the AR seed.
            targets, slot, level = clean.labels, slot + 1, level.roll(-1, 1)
            weight = weight.roll(-1, 1).masked_fill(_ends(block, last=True), 0.0)
        views = self.objective.views
        hidden = masked if clean.padding is None else masked | clean.padding
        return {
            "tokens": torch.cat([tokens.expand(views, -1).masked_fill(hidden, self.mask_id).flatten(), tokens]),
            "labels": torch.cat([targets.repeat(views), clean.labels]),
            "loss_mask": torch.cat([weight.flatten(), made["loss_mask"]]),
            "position_ids": made["position_ids"].repeat(views + 1),
            "level": level.flatten(),
            "slot": slot.repeat(views),
        }


def _ends(number: Tensor, last: bool) -> Tensor:
    """[L] whether each place is the last with its number; ``last`` says so for the sample's last place."""
    ends = torch.full((len(number),), last)
    ends[:-1] = number[1:] != number[:-1]
    return ends


class TriModeDataset(Dataset[Sample]):
    """An AR data set as training samples; noise is drawn here, in the loader's workers."""

    def __init__(self, samples: Any, maker: SampleMaker, split: int) -> None:
        self.samples = samples
        self.maker = maker
        self.split = split

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.maker.make(self.samples[index], self.split, int(index))
