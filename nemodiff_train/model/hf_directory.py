"""A Hugging Face directory on disk, opened once per command; the counterpart of a Megatron ``Checkpoint``."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.model.config_json import read_config
from nemodiff_train.model.families import HFConfig, ar_settings, architecture, is_left_out, stored_name
from nemodiff_train.model.headers import TensorHeader, read_headers
from nemodiff_train.model.pretrained import NEITHER, REMEDY, config_from, empty_reference, local_copy

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of plain weights by their names in safetensors."""


@dataclass(frozen=True)
class HFDirectory:
    """A model in a Hugging Face directory; each file is read at most once, when it is asked for.

    Raises:
        UserError: From every property, if a file that it is read from is missing or damaged, or a setting is one that
            no model can be made with.
    """

    path: Path

    @classmethod
    def open(cls, source: str) -> Self:
        """Open a directory, or a copy of what the hub holds under that name.

        Raises:
            UserError: It is neither, or has no ``config.json``.
        """
        path = Path(local_copy(source))
        if not (path / "config.json").is_file():
            raise UserError(f"'{source}' is not a checkpoint: {NEITHER}; {REMEDY}")
        return cls(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def settings(self) -> HFConfig:
        """Return the ``config.json``, as it is written there."""
        return read_config(self.path)

    @property
    def architecture(self) -> str:
        """Return the architecture that the ``config.json`` names."""
        return architecture(self.settings)

    @cached_property
    def config(self) -> PretrainedConfig:
        """Return the ``config.json`` as Transformers understands it."""
        return config_from(self.settings)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights that the ``config.json`` asks for, by their names in an AR model.

        A tied output layer is not among them.
        """
        return expected_shapes(ar_settings(self.settings))

    def stored_name(self, name: str) -> str:
        """Return the name in the files of an AR model's tensor."""
        return stored_name(self.architecture, name)

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Return the headers of all tensors in the files, by name."""
        return read_headers(self.path)

    @cached_property
    def weights(self) -> dict[str, TensorHeader]:
        """Return the headers of the language model's tensors, by their names in the files."""
        return {name: tensor for name, tensor in self.headers.items() if not is_left_out(self.architecture, name)}

    @property
    def dtype(self) -> torch.dtype:
        """Return the one dtype of weights that have been checked, whatever the ``config.json`` says."""
        return DTYPES[next(iter(self.weights.values())).dtype]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        return load_tokenizer(str(self.path))


def expected_shapes(settings: HFConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a ``config.json`` asks for, by their names in the files.

    A tied output layer is not among them.

    Raises:
        UserError: Transformers cannot build the model.
    """
    config = config_from(ar_settings(settings))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_reference(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return {stored_name(architecture(settings), name): shape for name, shape in shapes.items()}
