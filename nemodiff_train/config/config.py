"""The configuration of a run: Bridge's container, with the objective and the data it needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.config import ConfigContainer, GPTDatasetConfig

from nemodiff_train.data.manifest import Manifest
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.errors import UserError, unknown_choices
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.conversation import ConversationMaker
from nemodiff_train.objective.sample import SampleMaker, TriModeDataset
from nemodiff_train.validation.ranges import number


@dataclass(kw_only=True)
class IndexedDatasetConfig(DatasetProvider):
    """Megatron's .bin/.idx, made into training samples."""

    seq_length: int = 4096
    """L: clean tokens in a sample."""
    data: list[str] = field(default_factory=list)
    """Prefixes of .bin/.idx, or weights and prefixes in turn: ``[0.7, a, 0.3, b]``."""
    split: str = "99,1,0"
    """Shares of the documents for training, validation and test."""
    random_seed: int = 1234
    """Seed of the order of the samples."""
    num_workers: int = 2
    dataloader_type: str = "single"

    # Not settings: TriModeConfig.validate sets the first three, Bridge saves the fourth with checkpoints.
    objective = ObjectiveConfig()
    mask_token_id = 0
    batch_size = 1
    tokenizer = None

    conversations: ClassVar[bool] = False
    """Whether documents are conversations."""

    @property
    def prefixes(self) -> list[str]:
        """The data sets, without their weights."""
        return [part for part in map(str, self.data) if math.isnan(number(part))]

    @property
    def needs_segment_ids(self) -> bool:
        """Whether the blocks of one sample differ from those of another."""
        return self.objective.stage == "joint" and self.objective.block_schedule != "fixed"

    def problems(self, objective: ObjectiveConfig) -> list[str]:
        """What is wrong with these values under an objective, one line each."""
        raise NotImplementedError

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Training, validation and test samples; see :mod:`nemodiff_train.objective.sample`."""
        self.tokenizer = context.tokenizer
        splits, maker = self.read(context), self.maker(context.tokenizer)
        made: list[Any] = [samples and TriModeDataset(samples, maker, split) for split, samples in enumerate(splits)]
        return made[0], made[1], made[2]

    def read(self, context: DatasetBuildContext) -> Sequence[Any]:
        """What samples are made of, for each split."""
        raise NotImplementedError

    def maker(self, tokenizer: Any) -> SampleMaker:
        """What makes samples of it."""
        raise NotImplementedError

    def _shared(self, context: DatasetBuildContext) -> dict[str, Any]:
        """Megatron's settings that do not depend on what documents are."""
        return {
            "seq_length": self.seq_length,
            "data_path": [str(part) for part in self.data],
            "split": self.split,
            "random_seed": self.random_seed,
            "reset_position_ids": False,  # SampleMaker does what these are about; Megatron would loop over documents
            "reset_attention_mask": False,
            "create_attention_mask": False,
            "num_workers": self.num_workers,
            "tokenizer": context.tokenizer,
        }


def _samples(context: DatasetBuildContext) -> list[int]:
    return [context.train_samples, context.valid_samples, context.test_samples]


@dataclass(kw_only=True)
class TextDatasetConfig(IndexedDatasetConfig):
    """Text, read through ``GPTDataset``: documents one after another, cut into samples of L tokens."""

    path_to_cache: str | None = None
    """Folder for the sample index; beside the data when None."""
    reset_attention_mask: bool = False
    """Keep the documents of a sample apart: no attention across their ends, and blocks restart with each."""
    reset_position_ids: bool = False
    """Positions restart with each document; only together with ``reset_attention_mask``."""
    eod_mask_loss: bool = False
    """Leave the end-of-document tokens out of both losses, as places and as noise."""

    @property
    def needs_segment_ids(self) -> bool:
        """Whether the blocks of one sample differ from those of another."""
        return self.reset_attention_mask or super().needs_segment_ids

    def problems(self, objective: ObjectiveConfig) -> list[str]:
        """What is wrong with these values under an objective, one line each."""
        if self.reset_position_ids and not self.reset_attention_mask:
            return ["dataset.reset_position_ids=true takes dataset.reset_attention_mask=true as well"]
        return []

    def read(self, context: DatasetBuildContext) -> Sequence[Any]:
        """Samples of L tokens, for each split."""
        from megatron.bridge.data.utils import pretrain_train_valid_test_datasets_provider

        config = GPTDatasetConfig(
            **self._shared(context), path_to_cache=self.path_to_cache, eod_mask_loss=self.eod_mask_loss
        )
        config.finalize()
        return pretrain_train_valid_test_datasets_provider(_samples(context), config)

    def maker(self, tokenizer: Any) -> SampleMaker:
        """What makes samples of them."""
        return SampleMaker(
            objective=self.objective,
            mask_id=self.mask_token_id,
            batch_size=self.batch_size,
            document_end=tokenizer.eod if self.reset_attention_mask else None,
            restart_positions=self.reset_position_ids,
        )


@dataclass(kw_only=True)
class ChatDatasetConfig(IndexedDatasetConfig):
    """Conversations of ``nemodiff data prepare --chat``, packed into samples of L places; answers are learned."""

    conversations: ClassVar[bool] = True

    @property
    def needs_segment_ids(self) -> bool:
        """Always: blocks start with answers."""
        return True

    def problems(self, objective: ObjectiveConfig) -> list[str]:
        """What is wrong with these values under an objective, one line each."""
        if objective.stage == "joint" and objective.clean_attention == "block_causal":
            return [
                "objective.clean_attention=block_causal decodes blocks counted from the start of the text, but those of "
                "conversations start with answers; set clean_attention=causal"
            ]
        return []

    def read(self, context: DatasetBuildContext) -> Sequence[Any]:
        """Packs of conversations, for each split."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

        from nemodiff_train.data.conversations import ConversationDataset, PackConfig

        config = PackConfig(**self._shared(context), eod_mask_loss=False)
        config.block_size = self.objective.largest_block if self.objective.noisy_views else 1
        config.finalize()
        return BlendedMegatronDatasetBuilder(ConversationDataset, _samples(context), lambda: True, config).build()

    def maker(self, tokenizer: Any) -> SampleMaker:
        """What makes samples of them."""
        return ConversationMaker(
            objective=self.objective,
            mask_id=self.mask_token_id,
            batch_size=self.batch_size,
            length=self.seq_length,
            padding_id=tokenizer.eod,
        )

    def end_of_turn(self) -> int | None:
        """The token that ends every answer; None without data."""
        found = [manifest.eod_token_id for prefix in self.prefixes if (manifest := Manifest.read(prefix))]
        return found[0] if found else None


@dataclass(kw_only=True)
class DiagnosticsConfig:
    """What a run tells about itself besides its losses; to TensorBoard, W&B and ``metrics.jsonl``."""

    loss_interval: int = 10
    """Steps between figures of the diffusion loss by noise level and by position in the block; 0 for none."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Decoding in the training loop; see :mod:`nemodiff_train.training.callbacks.loop_evaluation`."""

    interval: int = 0
    """Steps between evaluations; 0 for none."""
    task: str = "arithmetic"
    """A built-in task, or a JSONL file of prompt and answer."""
    scorer: str = "numeric"
    """How a file's answers are scored: numeric or exact."""
    count: int = 16
    """Prompts, always the same, from the first."""
    modes: list[str] = field(default_factory=lambda: ["ar", "diffusion", "linear"])
    """Decoding modes; the AR stage uses ``ar`` alone."""
    max_new_tokens: int = 128
    """Exact limit for each prompt."""
    threshold: float = 0.9
    """Of block diffusion."""
    chat: bool = False
    """Prompts are put into the tokenizer's chat template."""


Reaction = Literal["stop", "skip", "rollback"]


@dataclass(kw_only=True)
class ResilienceConfig:
    """What a run does about faults; see docs/training.md, "When it stops".

    ``checkpoint.most_recent_k`` says how many checkpoints are kept; these are the other settings.
    """

    keep_every: int = 0
    """Keep checkpoints whose step is a multiple of this, whatever ``checkpoint.most_recent_k`` says; 0 for none."""
    on_non_finite: Reaction = "stop"
    """After a gradient that is not finite: stop, skip the update, or go back to the last checkpoint's weights."""
    on_spike: Reaction = "skip"
    """The same after a gradient norm above ``spike_factor`` times the median of the last ``spike_window``."""
    spike_factor: float = 0.0
    """0 for no such limit."""
    spike_window: int = 50
    """Steps of the median; no step counts as a spike before half of them are there."""
    patience: int = 5
    """Steps without an update in a row that are borne."""
    drift_interval: int = 1000
    """Steps between comparisons of the replicas' weights; 0 for none."""
    hang_timeout: float = 1800.0
    """Seconds without a sign of progress after which every rank writes its stacks and exits; 0 for no limit."""
    exit_grace: float = 240.0
    """Seconds from SIGTERM or SIGUSR1 until a run that has not saved and ended exits all the same."""
    pace_interval: int = 10
    """Steps between figures of slow data and slow ranks in ``status.json``; 0 for none."""
    restarts: int = 3
    """Starts in a row that may end without a new checkpoint; 0 for any number."""

    def problems(self) -> list[str]:
        """What is wrong with the settings, one line each."""
        found = unknown_choices("resilience", self)
        for name in (
            "keep_every",
            "spike_factor",
            "patience",
            "drift_interval",
            "hang_timeout",
            "pace_interval",
            "restarts",
        ):
            if getattr(self, name) < 0:
                found.append(f"resilience.{name} is {getattr(self, name)}; use 0 or more")
        if 0 < self.spike_factor <= 1:
            found.append(f"resilience.spike_factor is {self.spike_factor}; use a factor above 1, or 0 for none")
        if self.spike_window < 2:
            found.append(f"resilience.spike_window is {self.spike_window}; use 2 or more")
        if self.exit_grace <= 0:
            found.append(f"resilience.exit_grace is {self.exit_grace}; use more than 0")
        return found


@dataclass(kw_only=True)
class TriModeConfig(ConfigContainer):
    """Everything a run is made of.  ``objective`` to ``drafter`` are ours, the rest Bridge's."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    drafter: DrafterConfig | None = None
    """Train a drafter instead, whose adapters ``peft`` describes."""

    def validate(self) -> None:
        """Connect the parts, then let Bridge check and complete them.

        Raises:
            UserError: Naming everything that is wrong, before anything is built.
        """
        self.propagate()
        super().validate()

    def propagate(self) -> None:
        """Set the fields of the model and the data that follow from the objective.

        Raises:
            UserError: There is no usable mask token.
        """
        objective, model, data = self.objective, self.model, self.dataset
        model.noisy_views = objective.noisy_views
        model.block_size = objective.block_size
        model.largest_block = objective.largest_block
        model.clean_attention = objective.clean_attention
        model.shift = objective.shift
        model.seq_length = data.seq_length * (objective.noisy_views + 1)
        model.calculate_per_token_loss = True  # global averaging; see ObjectiveConfig
        self.ddp.average_in_collective = False
        data.objective, data.batch_size = objective, self.train.global_batch_size
        if isinstance(data, ChatDatasetConfig):
            model.add_stop_token(data.end_of_turn())
        if objective.stage == "joint":
            model.mask_token_id = data.mask_token_id = self.find_mask_token()

    def find_mask_token(self) -> int:
        """Id of the mask token: the checkpoint's, else the one ``objective.mask_token`` names, else the tokenizer's.

        Raises:
            UserError: There is none, the tokenizer lacks it, the model has no row for it, or the checkpoint has
                another.
        """
        own = self.model.mask_token_id
        if own is not None and self.objective.mask_token is None:
            return int(own)
        if not self.tokenizer.tokenizer_model:
            raise UserError("tokenizer.tokenizer_model is not set; give a Hugging Face directory or name")
        tokenizer = load_tokenizer(str(self.tokenizer.tokenizer_model))
        token = self.objective.mask_token or tokenizer.mask_token
        if token is None:
            raise UserError(
                f"neither the checkpoint nor the tokenizer {self.tokenizer.tokenizer_model} has a mask token; "
                "name one of its reserved tokens with objective.mask_token"
            )
        identifier = tokenizer.get_vocab().get(token)
        if identifier is None:
            raise UserError(
                f"objective.mask_token '{token}' is not in the tokenizer {self.tokenizer.tokenizer_model}; "
                "name one of its reserved tokens"
            )
        if own not in (None, identifier):
            raise UserError(
                f"objective.mask_token '{token}' has id {identifier}, but the checkpoint's mask token is {own}; "
                "leave objective.mask_token out"
            )
        if identifier >= self.model.vocab_size:
            raise UserError(
                f"objective.mask_token '{token}' has id {identifier}, outside the model's vocabulary of "
                f"{self.model.vocab_size}; name a token below that, or add one with "
                "'nemodiff convert import --add-mask-token'"
            )
        return int(identifier)
