"""A Megatron checkpoint on disk, opened once per command; nothing large is imported to look at one."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, Self, TypedDict

import yaml
from pydantic import Field, with_config

from nemodiff_train.console import warn
from nemodiff_train.errors import UserError
from nemodiff_train.model.checksums import damage, identity, iterations, step_of, structure_damage
from nemodiff_train.model.config_json import Rope, Size
from nemodiff_train.schema import AS_WRITTEN, checked


class Kind(StrEnum):
    """Kind of a checkpoint's weights."""

    AR = "AR model"
    """All weights of a model without a mask token."""
    TRI_MODE = "tri-mode model"
    """All weights of a model that has a mask token."""
    DRAFTER = "drafter"
    """Adapters that act on drafts alone, beside the model that they were trained for."""
    LORA = "LoRA"
    """Adapters to be merged into the weights of the model that they were trained on."""


class _Model(TypedDict, total=False):
    num_layers: Annotated[int, Field(gt=0, le=10_000)]
    hidden_size: Size
    ffn_hidden_size: Size | None
    num_attention_heads: Size
    num_query_groups: Size | None
    kv_channels: Size | None
    vocab_size: Size | None
    seq_length: Size
    block_size: Size
    largest_block: Size
    noisy_views: Annotated[int, Field(ge=0)]
    clean_attention: Literal["causal", "block_causal"]
    mask_token_id: Annotated[int, Field(ge=0)] | None
    layernorm_epsilon: Annotated[float, Field(gt=0, lt=1)]
    rotary_base: Annotated[float, Field(gt=0)]
    rotary_percent: Annotated[float, Field(gt=0, le=1)]
    rope_parameters: Rope
    bf16: bool
    fp16: bool
    hf_config: dict[str, Any]
    hf_generation_config: dict[str, Any]
    origin: dict[str, Any]


class _Optimizer(TypedDict):
    use_distributed_optimizer: bool
    lr: NotRequired[float | None]
    min_lr: NotRequired[float | None]


class _Saving(TypedDict):
    dist_ckpt_optim_fully_reshardable: bool
    pretrained_checkpoint: NotRequired[str | None]


class _Training(TypedDict):
    global_batch_size: Size | None


class _Adapters(TypedDict):
    dim: Size
    alpha: Annotated[float, Field(gt=0)]
    selector_rank: NotRequired[Annotated[int, Field(ge=0)]]


class _AdapterBase(TypedDict):
    iteration: str
    checksum: str


@with_config(AS_WRITTEN)
class _RunConfig(TypedDict, total=False):
    """Keys of a ``run_config.yaml`` that are read; Bridge reads the model and the adapters as well.

    The sections above are checked as strictly: they take the configuration of this type.
    """

    model: Required[_Model]
    optimizer: _Optimizer | None
    checkpoint: _Saving | None
    train: _Training | None
    peft: _Adapters | None
    drafter: dict[str, Any] | None
    adapter_base: _AdapterBase | None
    requested_settings: dict[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """The newest complete iteration of a Megatron checkpoint; its run configuration is parsed at most once."""

    path: Path
    """The folder that the user named: one ``iter_*``, or a folder of them."""
    iteration: Path
    """The ``iter_*`` folder itself."""

    @classmethod
    def find(cls, path: str | Path) -> Self | None:
        """Open the checkpoint at ``path``, or return None where there is none, as in a Hugging Face directory.

        Raises:
            UserError: No iteration is complete, by names and sizes of its files; the damaged file is named. Or the
                folder holds another model as well.
        """
        path = Path(path)
        single, several = (path / "run_config.yaml").is_file(), any(path.glob("iter_*/run_config.yaml"))
        if not single and not several:
            return None
        if (path / "config.json").is_file() or (single and several):
            other = "iter_* folders" if single and several else "a Hugging Face model (config.json)"
            raise UserError(f"'{path}' holds a Megatron checkpoint and {other}; move one of them elsewhere")
        return cls(path, _newest_complete(path, structure_damage))

    @classmethod
    def to_resume(cls, folder: str | Path | None, step: int | None) -> Self | None:
        """Open the checkpoint that a run would resume from; None where there is none, or where none is complete.

        Args:
            folder: Folder of the run's checkpoints, if any.
            step: Step to resume from; None for the newest.
        """
        if not folder:
            return None
        try:
            return cls.find(folder if step is None else Path(folder) / f"iter_{step:07d}")
        except UserError:
            return None  # AtomicCheckpointManager distinguishes the damaged from the unfinished

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the checkpoint at ``path``.

        Raises:
            UserError: There is no Megatron checkpoint, or no iteration is complete.
        """
        if (checkpoint := cls.find(path)) is None:
            raise UserError(f"'{path}' is not a Megatron checkpoint; make one with 'nemodiff convert import'")
        return checkpoint

    @property
    def step(self) -> int:
        """Return the number of training steps before it was saved."""
        return step_of(self.iteration)

    @cached_property
    def run_config(self) -> dict[str, Any]:
        """Return the configuration of the run that saved it, as plain values by section.

        Raises:
            UserError: The file is damaged, or has no section ``model``.
        """
        file = self.iteration / "run_config.yaml"
        try:
            sections = yaml.CSafeLoader(file.read_text()).get_single_data()
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"'{file}' is damaged ({reason}); take another iteration") from None
        if not isinstance(sections, dict) or not isinstance(sections.get("model"), dict):
            raise UserError(f"'{file}' describes no model; take another iteration")
        checked(_RunConfig, sections, file, "take another iteration")
        return sections

    @property
    def kind(self) -> Kind:
        """Return the kind of its weights."""
        if self.run_config.get("drafter") is not None:
            return Kind.DRAFTER
        if self.run_config.get("peft") is not None:
            return Kind.LORA
        return Kind.AR if self.run_config["model"].get("mask_token_id") is None else Kind.TRI_MODE

    @property
    def tokenizer_directory(self) -> Path:
        """Return the folder of the Hugging Face tokenizer that was saved with it.

        Raises:
            UserError: It was saved without one.
        """
        directory = self.iteration / "tokenizer"
        if not directory.is_dir():
            raise UserError(
                f"'{directory}' is missing: the checkpoint was saved without it; save it again with its tokenizer"
            )
        return directory

    @property
    def base(self) -> "Checkpoint":
        """Return the checkpoint that its adapters were trained on: the recorded step, with the recorded contents.

        Raises:
            UserError: That one is no longer there, no longer complete, or another one is in its place.
        """
        path = Path(str((self.run_config.get("checkpoint") or {}).get("pretrained_checkpoint")))
        known = self.run_config.get("adapter_base") or {}
        base = Checkpoint.find(path) if (path / "run_config.yaml").is_file() else None
        iteration = path / str(known.get("iteration"))
        base = base or (Checkpoint.find(iteration) if iteration.is_dir() else None)
        if base is None:
            raise UserError(
                f"'{self.iteration}' holds adapters of '{iteration}', which is not there; run from the folder that "
                "the training ran in, or put the checkpoint back"
            )
        base = base.verify_contents()
        if identity(base.iteration) != known.get("checksum"):
            raise UserError(
                f"'{self.iteration}' holds adapters of other weights than those in '{base.iteration}' now; put back "
                "the checkpoint that they were trained on"
            )
        return base

    def require_model(self) -> Self:
        """Return the checkpoint itself, which has to be one of a model.

        Raises:
            UserError: It holds a drafter.
        """
        if self.kind is Kind.DRAFTER:
            raise UserError(
                f"'{self.path}' is a drafter; name the model that it was trained for, and it with --drafter"
            )
        return self

    def require_drafter(self) -> Self:
        """Return the checkpoint itself, which has to be a drafter's.

        Raises:
            UserError: It is not.
        """
        if self.kind is not Kind.DRAFTER:
            raise UserError(f"'{self.path}' is not a drafter; train one with 'nemodiff train drafter'")
        return self

    def verify_contents(self) -> Self:
        """Compare every byte with the recorded checksums, when it is first called.

        Returns:
            The checkpoint itself, or the newest older iteration that is intact, with a warning.

        Raises:
            UserError: No iteration in the folder is complete; the damaged file is named.
        """
        return self._intact

    @cached_property
    def _intact(self) -> Self:
        verified = _newest_complete(self.path, damage)
        if verified == self.iteration:
            return self
        warn(f"'{self.iteration}' is damaged; taking '{verified}'")
        older = type(self)(self.path, verified)
        vars(older)["_intact"] = older
        return older


def _newest_complete(path: Path, find_damage: Callable[[Path], str | None]) -> Path:
    """Return the newest ``iter_*`` folder in which ``find_damage`` finds none; ``path``, if it is one itself."""
    if (path / "run_config.yaml").is_file():
        if reason := find_damage(path):
            raise UserError(f"the checkpoint '{path}' is damaged: {reason}; take another one")
        return path
    first = ""
    for iteration in iterations(path):
        if not (reason := find_damage(iteration)):
            return iteration
        first = first or f"'{iteration.name}': {reason}"
    raise UserError(
        f"no checkpoint in '{path}' is complete ({first}); resume the run that makes it, or take another one"
    )
