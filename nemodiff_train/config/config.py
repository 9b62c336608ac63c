"""The configuration of a run: Bridge's container with the objective, the data and the settings of this project."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import yaml
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.yaml_utils import safe_yaml_representers
from megatron.core.timers import Timers

from nemodiff_train.config.run import AdapterBase, DiagnosticsConfig, EvaluationConfig, ResilienceConfig
from nemodiff_train.config.schedule import ScheduleConfig
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.draft_adapter import DraftLoRA
from nemodiff_train.objective import ObjectiveConfig


@dataclass(kw_only=True)
class TriModeConfig(ConfigContainer):
    """The complete configuration of a run.  ``objective`` to ``drafter`` are ours, the other sections Bridge's."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    drafter: DrafterConfig | None = None
    """Train a drafter instead of a model; ``peft`` describes its adapters."""
    adapter_base: AdapterBase | None = None
    """Checkpoint that ``peft`` adapts; set when the run starts."""
    requested_settings: dict[str, Any] = field(default_factory=dict)
    """Every setting by its dotted key, as requested, before Bridge completes them; saved for the next resume."""

    @cached_property
    def start(self) -> Checkpoint | None:
        """Return the Megatron checkpoint whose weights the run starts from; None for a Hugging Face model or none.

        Raises:
            UserError: None of its iterations is complete.
        """
        folder = self.checkpoint.pretrained_checkpoint
        return Checkpoint.find(folder) if folder else None

    @cached_property
    def saved(self) -> Checkpoint | None:
        """Return the run's own checkpoint that this start resumes from; None at its first start."""
        return Checkpoint.to_resume(self.checkpoint.load, self.checkpoint.ckpt_step)

    def settings(self) -> dict[str, Any]:
        """Return every setting by its dotted key, as plain values; :attr:`requested_settings` once they are set."""
        return self.requested_settings or flattened(self.sections())

    def sections(self) -> dict[str, Any]:
        """Return the configuration as it is now: plain values by section, as YAML can hold them."""
        # As if it had been written and read, without the text in between.
        sections: dict[str, Any] = yaml.constructor.SafeConstructor().construct_document(self._node())
        del sections["requested_settings"]
        return sections

    def to_yaml(self, yaml_path: str) -> None:
        """Write the text that Bridge would, by libyaml: all ranks wait for it at every checkpoint."""
        with open(yaml_path, "w") as file:
            yaml.serialize(self._node(), file, Dumper=yaml.CSafeDumper)

    def _node(self) -> yaml.Node:
        with safe_yaml_representers():
            return yaml.SafeDumper(io.StringIO()).represent_data(self.to_dict())

    @classmethod
    def _convert_value_to_dict(cls, value: Any) -> Any:
        """Return a value as it is saved; None for what belongs to this process alone."""
        return None if _belongs_to_process(value) else super()._convert_value_to_dict(value)

    def validate(self) -> None:
        """Propagate the objective's settings, then let Bridge check and complete the configuration.

        Raises:
            UserError: There is no usable mask token.
        """
        self.propagate()
        super().validate()

    def propagate(self) -> None:
        """Set the fields of the model and the data that follow from the objective.

        Raises:
            UserError: There is no usable mask token.
        """
        self.resolve_fractions()
        objective, model, data = self.objective, self.model, self.dataset
        model.noisy_views = objective.noisy_views
        model.block_size = objective.block_size
        model.largest_block = objective.largest_block
        model.clean_attention = objective.clean_attention
        model.causal_noise = self.drafter is not None and self.drafter.draft_kind.causal
        model.shift = objective.shift
        model.seq_length = data.seq_length * (objective.noisy_views + 1)
        model.calculate_per_token_loss = True  # global averaging; see ObjectiveConfig
        self.ddp.average_in_collective = False
        data.objective, data.batch_size = objective, self.train.global_batch_size
        data.model_vocab_size = model.vocab_size
        in_run = f"{Path(str(self.checkpoint.save)).parent}/sample_index"
        data.index_folder = getattr(data, "path_to_cache", None) or in_run
        if data.holds_conversations:
            model.add_stop_token(data.eod_token_id())
        if self.has_masks:
            model.mask_token_id = data.mask_token_id = self.find_mask_token()

    @property
    def has_masks(self) -> bool:
        """Return whether samples have masked positions; those of some drafters have other noise."""
        return self.objective.stage == "joint" and not (self.drafter and self.drafter.draft_kind.uniform_noise)

    @property
    def selector_rank(self) -> int:
        """Return the inner dimension of the path selector, which then is all that is trained; 0 for none."""
        return self.peft.selector_rank if isinstance(self.peft, DraftLoRA) else 0

    def resolve_fractions(self) -> None:
        """Turn the schedule's fractions of the run into steps."""
        if isinstance(self.scheduler, ScheduleConfig) and self.train.train_iters:
            self.scheduler.resolve_fractions(self.train.train_iters)

    def find_mask_token(self) -> int:
        """Return the id of the checkpoint's mask token, else of ``objective.mask_token``, else of the tokenizer's.

        Raises:
            UserError: There is none, the tokenizer lacks it, the model has no row for it, or the checkpoint has
                another.
        """
        stored = self.model.mask_token_id
        if stored is not None and self.objective.mask_token is None:
            return int(stored)
        source = self.tokenizer.tokenizer_model
        if not source:
            raise UserError("tokenizer.tokenizer_model is not set; give a Hugging Face directory or name")
        tokenizer = load_tokenizer(str(source))
        token = self.objective.mask_token or tokenizer.mask_token
        if token is None:
            raise UserError(
                f"neither the checkpoint nor the tokenizer {source} has a mask token; "
                "name one of its reserved tokens with objective.mask_token"
            )
        token_id = tokenizer.get_vocab().get(token)
        if token_id is None:
            raise UserError(
                f"objective.mask_token '{token}' is not in the tokenizer {source}; name one of its reserved tokens"
            )
        if stored not in (None, token_id):
            raise UserError(
                f"objective.mask_token '{token}' has id {token_id}, but the checkpoint's mask token is {stored}; "
                "leave objective.mask_token out"
            )
        if token_id >= self.model.vocab_size:
            raise UserError(
                f"objective.mask_token '{token}' has id {token_id}, outside the model's vocabulary of "
                f"{self.model.vocab_size}; name a token below that, or add one with "
                "'nemodiff convert import --add-mask-token'"
            )
        return int(token_id)


def flattened(sections: dict[str, Any]) -> dict[str, Any]:
    """Return every setting of a configuration by its dotted key."""
    return dict(_leaves(sections, ""))


Changes = dict[str, tuple[Any, Any]]
"""Old and new value of each setting that differs, by its dotted key."""


def differences(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Return the settings that differ, sorted by their keys; what one side lacks is None there."""
    keys = sorted({*before, *now})
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _belongs_to_process(value: Any) -> bool:
    """Return whether a value is a clock, a method of a model or an optimizer, or a function that was given one."""
    if isinstance(value, list):
        return any(map(_belongs_to_process, value))
    given = (*value.args, *value.keywords.values()) if isinstance(value, partial) else ()
    return isinstance(value, MethodType | Timers) or not all(isinstance(x, str | int | float | None) for x in given)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value and value.get("_call_") is not False:
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value) if isinstance(value, dict) else value
