"""The training sample: L tokens become (V + 1) L positions, ``[noisy views | clean]``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nemodiff_train.objective.config import ObjectiveConfig
from nemodiff_train.objective.noise import Key, draw_noise
from nemodiff_train.objective.schedule import block_size_at

Sample = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CleanHalf:
    """The clean half of a training sample, and what noise may do to it; L positions."""

    tokens: Tensor
    """[L] int64 ids."""
    labels: Tensor
    """[L] int64 ids of the next tokens."""
    segment_ids: Tensor
    """[3, L] int32: document, block and position id of each position."""
    ar_loss_mask: Tensor
    """[L] bool: whether the next token has an AR loss."""
    maskable: Tensor
    """[L] bool: positions that noise may mask."""
    sequences: Tensor | None = None
    """[L] index of the sequence that a position's noise level is drawn for; None where the sample is one."""
    padding: Tensor | None = None
    """[L] bool: positions after an answer's end, which a decoder only sees masked; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class SampleMaker:
    """Turns samples of an AR data set into training samples."""

    objective: ObjectiveConfig
    mask_token_id: int = 0
    """Id of the mask token; unused in the AR stage."""
    batch_size: int = 1
    """Samples in a global batch."""
    eod_token_id: int | None = None
    """Id of the token that ends a document, where documents are kept apart; None to ignore them."""
    restart_positions: bool = False
    """Position ids restart with each document."""
    no_loss_token_id: int | None = None
    """Id of a token that neither loss learns; None for none."""

    def make(self, sample: Mapping[str, Tensor], split: int, index: int) -> Sample:
        """Make the training sample of an AR sample.

        ================= =============================================== ======================================
        field             noisy views, [V L]                              clean half, [L]
        ================= =============================================== ======================================
        tokens            the tokens, or the mask token where masked      the tokens
        labels            the tokens (the next ones if shifted)           the next tokens
        loss_mask         w where masked, else 0                          1 where the token has an AR loss, else 0
        position_ids      0 .. L-1, or restarting with documents          the same
        noise_level       t of the predicted token
        index_in_block    index of the predicted token in its block
        ================= =============================================== ======================================

        and once per sample, not once per view: ``segment_ids`` [3, L], the document, block and position id of each
        position; ``maskable`` [L]; ``index``, a scalar.  ``alpha`` and the number of views are not in the weights:
        the loss applies them, so that both parts can be reported separately.

        Args:
            sample: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each [L].
            split: Index of the split; 0 is training.
            index: Index of the sample in its split.
        """
        block_size = block_size_at(self.objective, index // self.batch_size if split == 0 else None)
        clean = self.clean(sample, block_size)
        ar_loss_mask = clean.ar_loss_mask
        if self.objective.noisy_views and self.objective.clean_attention == "block_causal":
            # Within a block every position sees the next token; only a block's last position does not.
            ar_loss_mask = ar_loss_mask & _is_last(clean.segment_ids[1], at_end=True)
        fields = {
            "tokens": clean.tokens,
            "labels": clean.labels,
            "loss_mask": ar_loss_mask.float(),
            "position_ids": clean.segment_ids[2].long(),
            "segment_ids": clean.segment_ids,
            "maskable": clean.maskable,
            "index": torch.tensor(index),
        }
        if self.objective.noisy_views:
            fields.update(self._with_views(clean, fields, Key(self.objective.seed, split, index), block_size))
        return fields

    def clean(self, sample: Mapping[str, Tensor], block_size: int) -> CleanHalf:
        """Return the clean half of an AR sample.

        Args:
            sample: As :meth:`make` takes it.
            block_size: Positions per block.
        """
        tokens, maskable = sample["tokens"], sample["loss_mask"] > 0
        if self.no_loss_token_id is not None:
            maskable = maskable & (tokens != self.no_loss_token_id)
        # [L] index of each position's document, whose last token belongs to it, and the position's index in it.
        position = torch.arange(len(tokens))
        ends = torch.zeros_like(position) if self.eod_token_id is None else (tokens == self.eod_token_id).long()
        document = ends.cumsum(0) - ends
        in_document = position - torch.searchsorted(document, document)
        # [3, L] document, block and position id of each position.
        block = (in_document % block_size == 0).cumsum(0) - 1
        position_ids = in_document if self.restart_positions else position
        segment_ids = torch.stack([document, block, position_ids]).int()
        ends_document = _is_last(segment_ids[0], at_end=int(tokens[-1]) == self.eod_token_id)
        return CleanHalf(
            tokens=tokens,
            labels=sample["labels"],
            segment_ids=segment_ids,
            ar_loss_mask=maskable & ~ends_document,
            maskable=maskable,
        )

    def _with_views(self, clean: CleanHalf, fields: Sample, key: Key, block_size: int) -> Sample:
        """Return the fields that gain V noisy views, [V L] or [(V + 1) L] each."""
        tokens, block, views = clean.tokens, clean.segment_ids[1], self.objective.views
        sequences = None if clean.sequences is None else clean.sequences.numpy()
        noise = draw_noise(
            key, clean.maskable.numpy(), block.long().numpy(), self.objective, block_size, self.batch_size, sequences
        )
        masked, weight, level = (torch.from_numpy(array) for array in noise)  # [V, L] each

        # [L] what a noisy position predicts, its own token or the next one, and the index of that in its block.
        labels, index_in_block = tokens, torch.arange(len(block)) - torch.searchsorted(block, block)
        if self.objective.shift:
            # A block's first token would be predicted from a block it cannot see; decoding has it from AR.
            labels, index_in_block, level = clean.labels, index_in_block + 1, level.roll(-1, 1)
            weight = weight.roll(-1, 1).masked_fill(_is_last(block, at_end=True), 0.0)
        # [V, L] positions that the views mask, and each field: the views one after another, then the clean half.
        is_masked = masked if clean.padding is None else masked | clean.padding
        return {
            "tokens": torch.cat(
                [tokens.expand(views, -1).masked_fill(is_masked, self.mask_token_id).flatten(), tokens]
            ),
            "labels": torch.cat([labels.repeat(views), clean.labels]),
            "loss_mask": torch.cat([weight.flatten(), fields["loss_mask"]]),
            "position_ids": fields["position_ids"].repeat(views + 1),
            "noise_level": level.flatten(),
            "index_in_block": index_in_block.repeat(views),
        }


def _is_last(segments: Tensor, at_end: bool) -> Tensor:
    """Return [L] whether each position is the last of its segment; ``at_end`` says so for the sample's last one."""
    last = torch.full((len(segments),), at_end)
    last[:-1] = segments[1:] != segments[:-1]
    return last


class TriModeDataset(Dataset[Sample]):
    """An AR data set as training samples; noise is drawn here, in the loader's workers.

    Args:
        samples: The AR samples, as ``maker`` takes them.
        maker: Makes the training samples.
        split: Index of the split; 0 is training.
    """

    def __init__(self, samples: Sequence[Mapping[str, Tensor]], maker: SampleMaker, split: int) -> None:
        self.samples = samples
        self.maker = maker
        self.split = split

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.maker.make(self.samples[index], self.split, int(index))
