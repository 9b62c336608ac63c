"""Megatron's mock text, for a run without data: documents that count 1, 2, 3, ... to a random length."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from megatron.bridge.training.config import GPTDatasetConfig
from megatron.core.datasets.gpt_dataset import MockGPTDataset, MockGPTLowLevelDataset

MOCK = "mock"
"""Value of ``dataset.data`` in the place of a prefix."""


@dataclass(init=False)  # the parent's __init__ takes no further settings
class MockConfig(GPTDatasetConfig):
    """Megatron's settings of a data set, and the ids that its text may hold."""

    model_vocab_size: int = 0
    """Ids are below it."""
    mask_token_id: int = -1
    """Id that never occurs."""


class _Documents(MockGPTLowLevelDataset):
    """Megatron's mock documents, without the mask token and ids beyond the model's vocabulary."""

    def __init__(self, config: MockConfig) -> None:
        super().__init__(config.tokenizer)
        self.vocab_size: int = min(int(config.tokenizer.vocab_size), config.model_vocab_size)
        self.mask_token_id = config.mask_token_id

    def __getitem__(self, idx: int) -> npt.NDArray[np.int64]:
        tokens = super().__getitem__(idx)
        return np.where(tokens == self.mask_token_id, (tokens + 1) % self.vocab_size, tokens)


class MockText(MockGPTDataset):
    """Samples of Megatron's mock documents."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: MockConfig) -> _Documents:
        """Return the documents; there is nothing to read."""
        return _Documents(config)
