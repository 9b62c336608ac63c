"""Packs of conversations from Megatron's indexed data set; see :mod:`nemodiff_train.objective.conversation`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.bridge.training.config import GPTDatasetConfig
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from nemodiff_train.data.packing import pack
from nemodiff_train.errors import UserError


@dataclass(init=False)  # its parent's takes what this adds nothing to
class PackConfig(GPTDatasetConfig):
    """Megatron's settings of a data set, and the grid that answers are padded to."""

    block_size: int = 1
    """Positions that an answer is rounded up to; 1 for no padding."""


class ConversationDataset(MegatronDataset):
    """Whole conversations, packed into samples of at most ``sequence_length`` places.

    The packs are the same in every epoch, their order is not.  A conversation that is too long on its own is
    cut; one without an answer before the cut is left out.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: Any,
        num_samples: int | None,
        index_split: Split,
        config: PackConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        lengths, firsts = dataset.sequence_lengths.astype(np.int64), dataset.document_indices.astype(np.int64)
        answer = np.arange(len(lengths)) - np.repeat(firsts[:-1], np.diff(firsts))
        padded = np.where(answer % 2 == 1, -(-lengths // config.block_size) * config.block_size, lengths)
        places = np.add.reduceat(padded, firsts[:-1])[indices]
        usable = indices[lengths[firsts[indices]] < config.sequence_length]
        if not len(usable):
            raise UserError(
                f"{dataset_path}: no conversation's first answer begins within dataset.seq_length="
                f"{config.sequence_length}; raise it"
            )
        sizes = places[np.isin(indices, usable)].clip(max=config.sequence_length)
        bins = pack(sizes, config.sequence_length, config.random_seed)
        self.packs = [[int(usable[item]) for item in items] for items in bins]
        self._order: tuple[int, Any] = (-1, None)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Documents."""
        return len(low_level_dataset.document_indices) - 1

    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)

    def __len__(self) -> int:
        return self.num_samples or len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A pack, as :meth:`nemodiff_train.objective.conversation.ConversationMaker.clean` takes it."""
        epoch, place = divmod(index, len(self.packs))
        if self._order[0] != epoch:
            draw = np.random.default_rng([self.config.random_seed, epoch])
            self._order = epoch, draw.permutation(len(self.packs))
        documents = self.packs[self._order[1][place]]
        turns = [range(*self.dataset.document_indices[each : each + 2].tolist()) for each in documents]
        tokens = [self.dataset[sequence] for turn in turns for sequence in turn]
        return {
            "tokens": torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
            "lengths": torch.tensor([len(each) for each in tokens]),
            "answers": torch.tensor([place % 2 == 1 for turn in turns for place in range(len(turn))]),
            "conversations": torch.tensor([number for number, turn in enumerate(turns) for _ in turn]),
        }
