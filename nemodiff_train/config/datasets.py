"""The data of a run: text or conversations in Megatron's .bin/.idx, turned into training samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.utils import pretrain_train_valid_test_datasets_provider
from megatron.bridge.training.config import GPTDatasetConfig
from megatron.bridge.training.tokenizers.tokenizer import MegatronTokenizer
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from nemodiff_train.data.conversations import ConversationDataset, PackConfig
from nemodiff_train.data.index_file import read_index
from nemodiff_train.data.manifest import Manifest, contents_digest
from nemodiff_train.data.mock import MOCK, MockConfig, MockText
from nemodiff_train.data.tokenizer import use_tokenizer_file
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.conversation import ConversationMaker
from nemodiff_train.objective.sample import SampleMaker, TriModeDataset


def parse_number(text: object) -> float:
    """Return the number that a text stands for, or NaN if it is not one."""
    try:
        return float(str(text))
    except ValueError:
        return math.nan


@dataclass(kw_only=True)
class IndexedDatasetConfig(DatasetProvider):
    """Data in Megatron's .bin/.idx format; the settings that text and conversations share."""

    seq_length: int = 4096
    """L: clean tokens per sample."""
    data: list[str] = field(default_factory=list)
    """Prefixes of .bin/.idx, or weights and prefixes in turn: ``[0.7, a, 0.3, b]``; ``mock`` for generated text."""
    split: str = "99,1,0"
    """Shares of the documents for training, validation and test."""
    random_seed: int = 1234
    """Seed of the order of the samples."""
    num_workers: int = 2
    dataloader_type: str = "single"

    # Not settings: TriModeConfig.propagate sets the first five, a resume the next; Bridge saves the last with
    # checkpoints.
    objective = ObjectiveConfig()
    mask_token_id = 0
    model_vocab_size = 0
    batch_size = 1
    index_folder = ""
    samples_ahead = 0
    tokenizer = None

    holds_conversations: ClassVar[bool] = False

    @property
    def prefixes(self) -> list[str]:
        """Return the data sets without their weights; none for mock text."""
        names = [part for part in map(str, self.data) if math.isnan(parse_number(part))]
        return [] if set(names) == {MOCK} else names

    @property
    def is_mock(self) -> bool:
        """Return whether the text is generated: every prefix is ``mock``."""
        return MOCK in self.data and not self.prefixes

    @property
    def needs_segment_ids(self) -> bool:
        """Return whether the block boundaries differ between samples."""
        return self.objective.stage == "joint" and self.objective.block_schedule != "fixed"

    def eod_token_id(self) -> int | None:
        """Return the token that ends every document of text, or every answer, or None where no manifest says so."""
        manifests = (Manifest.read(prefix) for prefix in self.prefixes)
        return next((manifest.eod_token_id for manifest in manifests if manifest), None)

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Build training, validation and test samples; see :mod:`nemodiff_train.objective.sample`."""
        self.tokenizer = context.tokenizer
        loaded = context.tokenizer._tokenizer.tokenizer  # Transformers', which Bridge saves with checkpoints
        use_tokenizer_file(loaded, loaded.name_or_path)
        maker = self.sample_maker(context.tokenizer)
        train, validation, test = (
            documents and TriModeDataset(documents, maker, split)
            for split, documents in enumerate(self.read(context))
        )
        return train, validation, test

    def read(self, context: DatasetBuildContext) -> Sequence[Any]:
        """Return what the samples of each split are made of."""
        raise NotImplementedError

    def sample_maker(self, tokenizer: MegatronTokenizer) -> SampleMaker:
        """Return the object that turns them into samples."""
        raise NotImplementedError

    def _sample_counts(self, context: DatasetBuildContext) -> list[int]:
        """Return the samples of each split; a run may have read more of the first than its steps and batch say."""
        return [context.train_samples + self.samples_ahead, context.valid_samples, context.test_samples]

    def _megatron_settings(self, context: DatasetBuildContext) -> dict[str, Any]:
        """Return Megatron's settings that text and conversations share."""
        return {
            "seq_length": self.seq_length,
            "data_path": None if self.is_mock else weighted(list(map(str, self.data))),
            "split": self.split,
            "random_seed": self.random_seed,
            # SampleMaker does what these three are about; Megatron would loop over the documents in Python.
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "create_attention_mask": False,
            "num_workers": self.num_workers,
            "tokenizer": context.tokenizer,
        }


def weighted(data: list[str]) -> list[str]:
    """Return a blend with weights: where it has none, the tokens of each data set, as if they were one.

    Without weights, Megatron blends a single epoch.
    """
    if len(data) < 2 or not all(math.isnan(parse_number(part)) for part in data):
        return data
    return [word for prefix in data for word in (str(int(read_index(prefix).lengths.sum())), prefix)]


@dataclass(kw_only=True)
class TextDatasetConfig(IndexedDatasetConfig):
    """Text, read through ``GPTDataset``: documents one after another, cut into samples of L tokens."""

    path_to_cache: str | None = None
    """Folder of the sample index; in the run's folder when None."""
    reset_attention_mask: bool = False
    """Keep the documents of a sample apart: no attention across their ends, and blocks restart with each."""
    reset_position_ids: bool = False
    """Restart positions with each document; only together with ``reset_attention_mask``."""
    eod_mask_loss: bool = False
    """Leave the end-of-document tokens out of both losses: they are neither predicted nor masked."""

    @property
    def needs_segment_ids(self) -> bool:
        """Return whether the block boundaries differ between samples."""
        return self.reset_attention_mask or super().needs_segment_ids

    def read(self, context: DatasetBuildContext) -> Sequence[Any]:
        """Return samples of L tokens for each split."""
        counts = self._sample_counts(context)
        if self.is_mock:
            mock = MockConfig(**self._megatron_settings(context), eod_mask_loss=False)
            mock.model_vocab_size = self.model_vocab_size
            mock.mask_token_id = self.mask_token_id if self.objective.noisy_views else -1
            mock.finalize()
            return BlendedMegatronDatasetBuilder(MockText, counts, lambda: True, mock).build()
        config = GPTDatasetConfig(
            **self._megatron_settings(context),
            path_to_cache=f"{self.index_folder}/{contents_digest(self.prefixes)}",
            eod_mask_loss=False,  # SampleMaker does this as well, by the token that the data end documents with
        )
        config.finalize()
        return pretrain_train_valid_test_datasets_provider(counts, config)

    def sample_maker(self, tokenizer: MegatronTokenizer) -> SampleMaker:
        """Return the object that adds noise to them."""
        end = self.eod_token_id()
        end = tokenizer.eod if end is None else end
        return SampleMaker(
            objective=self.objective,
            mask_token_id=self.mask_token_id,
            batch_size=self.batch_size,
            eod_token_id=end if self.reset_attention_mask else None,
            restart_positions=self.reset_position_ids,
            no_loss_token_id=end if self.eod_mask_loss else None,
        )


@dataclass(kw_only=True)
class ChatDatasetConfig(IndexedDatasetConfig):
    """Conversations of ``nemodiff data prepare --chat``, packed into samples of L tokens; answers are trained on."""

    holds_conversations: ClassVar[bool] = True

    @property
    def needs_segment_ids(self) -> bool:
        """Return True: blocks start with answers."""
        return True

    def read(self, context: DatasetBuildContext) -> Sequence[Any]:
        """Return packs of conversations for each split."""
        config = PackConfig(**self._megatron_settings(context), eod_mask_loss=False)
        config.block_size = self.objective.largest_block if self.objective.noisy_views else 1
        config.finalize()
        counts = self._sample_counts(context)
        return BlendedMegatronDatasetBuilder(ConversationDataset, counts, lambda: True, config).build()

    def sample_maker(self, tokenizer: MegatronTokenizer) -> SampleMaker:
        """Return the object that lays the packs out and adds noise to them."""
        return ConversationMaker(
            objective=self.objective,
            mask_token_id=self.mask_token_id,
            batch_size=self.batch_size,
            length=self.seq_length,
            padding_id=tokenizer.eod,
        )


def indexed_dataset(prefix: str, seq_length: int) -> IndexedDatasetConfig:
    """Return all of a data set for training: conversations, if its manifest says so, else text.

    Args:
        prefix: Its path without ``.bin``, or ``mock``.
        seq_length: Clean tokens per sample.

    Raises:
        UserError: The manifest is damaged.
    """
    manifest = Manifest.read(prefix)
    kind = ChatDatasetConfig if manifest and manifest.chat_template else TextDatasetConfig
    return kind(seq_length=seq_length, data=[prefix], split="100,0,0")
