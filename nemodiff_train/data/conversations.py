"""Pack conversations from Megatron's indexed data set; see :mod:`nemodiff_train.objective.conversation`."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from megatron.bridge.training.config import GPTDatasetConfig
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from nemodiff_train.console import warn
from nemodiff_train.errors import UserError


@dataclass(init=False)  # the parent's __init__ takes no further settings
class PackConfig(GPTDatasetConfig):
    """Megatron's settings of a data set, and the grid that answers are padded to."""

    block_size: int = 1
    """Number of positions that an answer is rounded up to; 1 for no padding."""


class ConversationDataset(MegatronDataset):
    """Whole conversations, packed into samples of at most ``sequence_length`` positions.

    The packs are the same in every epoch, their order is not. A conversation that is too long on its own is
    cut; one without an answer before the cut is left out.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: npt.NDArray[np.int64],
        num_samples: int | None,
        index_split: Split,
        config: PackConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        lengths, firsts = dataset.sequence_lengths.astype(np.int64), dataset.document_indices.astype(np.int64)
        # Sequences of a document alternate between prompt and answer; answers are padded to whole blocks.
        turn = np.arange(len(lengths)) - np.repeat(firsts[:-1], np.diff(firsts))  # [sequences] index in its document
        padded = np.where(turn % 2 == 1, -(-lengths // config.block_size) * config.block_size, lengths)
        sizes = np.add.reduceat(padded, firsts[:-1])[indices]  # [documents of the split] positions
        # A conversation whose first prompt fills the sample has no answer in it.
        usable = indices[lengths[firsts[indices]] < config.sequence_length]
        if not len(usable):
            raise UserError(
                f"{dataset_path}: no conversation's first answer begins within dataset.seq_length="
                f"{config.sequence_length}; raise it"
            )
        cut = int((sizes > config.sequence_length).sum()) - (len(indices) - len(usable))
        if lost := len(indices) - len(usable) + cut:
            warn(
                f"{dataset_path}, {index_split.name} split: of {len(indices)} conversations {lost} are longer than "
                f"dataset.seq_length={config.sequence_length}: {cut} are cut, {lost - cut} left out"
            )
        usable_sizes = sizes[np.isin(indices, usable)].clip(max=config.sequence_length)
        bins = pack(usable_sizes, config.sequence_length, config.random_seed)
        self.packs = [[int(usable[item]) for item in items] for items in bins]
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Return the number of documents."""
        return len(low_level_dataset.document_indices) - 1

    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)

    def __len__(self) -> int:
        return self.num_samples or len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a pack for :meth:`nemodiff_train.objective.conversation.ConversationMaker.clean`."""
        epoch, number = divmod(index, len(self.packs))
        if self._epoch != epoch:
            draw = np.random.default_rng([self.config.random_seed, epoch])
            self._epoch, self._order = epoch, draw.permutation(len(self.packs))
        documents = self.packs[self._order[number]]
        turns = [range(*self.dataset.document_indices[document : document + 2].tolist()) for document in documents]
        tokens = [self.dataset[sequence] for sequences in turns for sequence in sequences]
        return {
            "tokens": torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
            "lengths": torch.tensor([len(sequence) for sequence in tokens]),
            "answers": torch.tensor([turn % 2 == 1 for sequences in turns for turn in range(len(sequences))]),
            "conversations": torch.tensor([document for document, sequences in enumerate(turns) for _ in sequences]),
        }


def pack(sizes: npt.NDArray[np.int64], capacity: int, seed: int) -> list[list[int]]:
    """Pack by best fit in random order: each item goes to the open bin that it leaves the least room in.

    The order is random so that a bin is a random draw of items, however the items were sorted.

    Args:
        sizes: [items] positions that each takes, 1 .. ``capacity``.
        capacity: Number of positions in a bin.
        seed: Seed of the order; the same seed gives the same bins.

    Returns:
        The item numbers in each bin.
    """
    smallest = int(sizes.min())
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (positions left, bin number), sorted
    for item in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        size = int(sizes[item])
        best = bisect_left(open_bins, (size, 0))
        if best < len(open_bins):
            left, number = open_bins.pop(best)
            bins[number].append(item)
        else:
            left, number = capacity, len(bins)
            bins.append([item])
        if left - size >= smallest:
            insort(open_bins, (left - size, number))
    return bins
