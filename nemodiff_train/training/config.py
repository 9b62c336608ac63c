"""The configuration of a run: Bridge's container, with the objective and the data it needs."""

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.config import ConfigContainer, GPTDatasetConfig

from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.sample import JointDataset


@dataclass(kw_only=True)
class TextDatasetConfig(DatasetProvider):
    """Text in Megatron's .bin/.idx, read through ``GPTDataset`` and doubled in the joint stage."""

    seq_length: int = 4096
    """L: clean tokens in a sample."""
    data: list[str] = field(default_factory=list)
    """Prefixes of .bin/.idx, or weights and prefixes in turn: ``[0.7, a, 0.3, b]``."""
    split: str = "99,1,0"
    """Shares of the documents for training, validation and test."""
    random_seed: int = 1234
    """Seed of the order of the samples."""
    path_to_cache: str | None = None
    """Folder for the sample index; beside the data when None."""
    num_workers: int = 2
    dataloader_type: str = "single"

    # Not settings: TriModeConfig.validate sets the first two, Bridge saves the third with checkpoints.
    objective = None
    mask_token_id = None
    tokenizer = None

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Training, validation and test samples; see :mod:`nemodiff_train.objective.sample`."""
        from megatron.bridge.data.utils import pretrain_train_valid_test_datasets_provider

        config = GPTDatasetConfig(
            seq_length=self.seq_length,
            data_path=[str(part) for part in self.data],
            split=self.split,
            random_seed=self.random_seed,
            path_to_cache=self.path_to_cache,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            num_workers=self.num_workers,
        )
        self.tokenizer = config.tokenizer = context.tokenizer
        config.finalize()
        sizes = [context.train_samples, context.valid_samples, context.test_samples]
        splits = pretrain_train_valid_test_datasets_provider(sizes, config)
        if self.objective is None:
            return splits
        return tuple(
            None if samples is None else JointDataset(samples, self.objective, self.mask_token_id, number)
            for number, samples in enumerate(splits)
        )


@dataclass(kw_only=True)
class TriModeConfig(ConfigContainer):
    """Everything a run is made of.  ``objective`` is ours; the rest is Bridge's."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def validate(self) -> None:
        """Connect the parts, then let Bridge check and complete them.

        Raises:
            UserError: Naming everything that is wrong, before anything is built.
        """
        self._connect()
        super().validate()

    def _connect(self) -> None:
        joint = self.objective.stage == "joint"
        self.model.joint = joint
        self.model.block_size = self.objective.block_size
        self.model.shift = self.objective.shift
        self.model.seq_length = self.dataset.seq_length * (2 if joint else 1)
        self.model.calculate_per_token_loss = True  # global averaging; see ObjectiveConfig
        self.ddp.average_in_collective = False
        if joint:
            self.model.mask_token_id = self.dataset.mask_token_id = self.find_mask_token()
            self.dataset.objective = self.objective

    def find_mask_token(self) -> int:
        """Id of ``objective.mask_token``.

        Raises:
            UserError: The tokenizer lacks it, or the model has no row for it.
        """
        token = self.objective.mask_token
        if not self.tokenizer.tokenizer_model:
            raise UserError("tokenizer.tokenizer_model is not set; give a Hugging Face directory or name")
        identifier = load_tokenizer(str(self.tokenizer.tokenizer_model)).get_vocab().get(token)
        if identifier is None:
            raise UserError(
                f"objective.mask_token '{token}' is not in the tokenizer {self.tokenizer.tokenizer_model}; "
                "name one of its reserved tokens"
            )
        if identifier >= self.model.vocab_size:
            raise UserError(
                f"objective.mask_token '{token}' has id {identifier}, outside the model's vocabulary of "
                f"{self.model.vocab_size}; name a token below that"
            )
        return int(identifier)
