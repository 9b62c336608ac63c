"""``nemodiff convert verify``: compare two checkpoints, tensor by tensor and by their logits."""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemodiff_train.console import console, quiet
from nemodiff_train.conversion.exporting import full_tensors
from nemodiff_train.conversion.headers import opened
from nemodiff_train.conversion.importing import build, load_weights, set_dtype
from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.session import Session, check_prompts
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.families import ar_settings, architecture, stored_name
from nemodiff_train.model.loading import load_model, start_model_parallel
from nemodiff_train.model.pretrained import config_from, local_copy, model_from, stored_settings
from nemodiff_train.model.provider import TriModeModelProvider

ROUNDING = 32
"""Allowed difference of logits between two implementations, which add the same numbers in another order, in units of
the dtype's spacing at the largest logit."""


def verify(a: str, b: str, *, tolerance: float = 0.0, prompt: str = "The quick brown fox") -> bool:
    """Compare every tensor of two checkpoints, and their logits on a prompt; print a table.

    AR logits of a Hugging Face directory are computed by Transformers.  Comparing it with what was imported from it
    therefore compares two implementations as well, which may differ by rounding.

    Args:
        a: Hugging Face directory or Megatron checkpoint.
        b: The other one.
        tolerance: Largest difference of an element of weights, and of logits by one implementation.
        prompt: Text for the logits.

    Returns:
        Whether all differences are within the tolerance.

    Raises:
        UserError: One of them cannot be read, or the prompt has no tokens.
    """
    start_model_parallel(1)
    with quiet():
        one, other = _open_side(a), _open_side(b)
        tokens = _tokenize(one, prompt)
        with console.status("comparing tensors"):
            rows = _compare_tensors(one, other, tolerance)
        with console.status("comparing logits"):
            rows.append(_compare_ar_logits(one, other, tokens, tolerance))
            masked = one.provider if one.provider.mask_token_id is not None else other.provider
            if masked.mask_token_id is not None:
                block = torch.full((1, masked.block_size), masked.mask_token_id)
                logits = [side.diffusion_logits(tokens, block) for side in (one, other)]
                rows.append(_row("block-diffusion logits", _difference(*logits), tolerance))
    _print(rows, a, b)
    return all(row.equal for row in rows)


@dataclass
class _Row:
    """One line of the table."""

    name: str
    count: int
    """Tensors that it stands for."""
    difference: float
    """Largest absolute difference of an element."""
    equal: bool
    remark: str = ""


@dataclass
class _Side(ABC):
    """One of the two checkpoints."""

    path: str
    provider: TriModeModelProvider
    tokenizer: Path

    @property
    def ar_config(self) -> dict[str, Any]:
        """Return the ``config.json`` of the AR model."""
        return ar_settings(self.provider.hf_config)

    @cached_property
    @abstractmethod
    def chunks(self) -> list[GPTModel]:
        """Return the Megatron model with its weights."""

    @cached_property
    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the AR model by name, without a tied output layer."""

    def ar_logits(self, tokens: Tensor) -> Tensor:
        """Return the fp32 logits [1, n, vocabulary] of a causal forward over tokens [1, n]."""
        session = Session(self.chunks, 1, tokens.shape[1], None)
        return session.forward(tokens, torch.zeros(1, dtype=torch.long), "verify", causal=True)

    def diffusion_logits(self, tokens: Tensor, block: Tensor) -> Tensor:
        """Return the fp32 logits [1, k, vocabulary] of a block [1, k] of mask tokens after a prompt [1, n]."""
        session = Session(self.chunks, 1, tokens.shape[1] + block.shape[1], None)
        session.prefill(tokens.tolist())
        first_row = torch.zeros(1, dtype=torch.long, device=session.device)
        return session.forward(block.to(session.device), first_row, "denoise")


@dataclass
class _Megatron(_Side):
    checkpoint: Checkpoint

    @cached_property
    def chunks(self) -> list[GPTModel]:
        return load_model(self.checkpoint).chunks

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return _without_tied_head(dict(full_tensors(self.chunks, self.ar_config)), self.ar_config)


@dataclass
class _HuggingFace(_Side):
    dtype: str
    """Of the weights, as safetensors names it."""

    @cached_property
    def chunks(self) -> list[GPTModel]:
        set_dtype(self.provider, self.dtype)
        chunks = build(self.provider)
        load_weights(chunks, self.path, f"reading {self.path}")
        return chunks

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        kind = architecture(stored_settings(self.path))
        ar_names = {stored_name(kind, name): name for name in self._empty_model("meta").state_dict()}
        weights = {}
        for name, tensor in check_weights(Path(self.path)).items():
            with opened(tensor.file) as content:
                weights[ar_names[name]] = content.get_tensor(name)
        return _without_tied_head(weights, self.ar_config)

    def ar_logits(self, tokens: Tensor) -> Tensor:
        model = self._empty_model("cpu")
        model.load_state_dict(self.weights, strict=False, assign=True)
        model.tie_weights()
        with torch.inference_mode():
            logits: Tensor = model.eval()(tokens).logits
        return logits.float()

    def _empty_model(self, device: str) -> PreTrainedModel:
        config = config_from(self.ar_config)
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model


def _open_side(path: str) -> _Side:
    if checkpoint := Checkpoint.find(path):
        return _Megatron(path, model_from(checkpoint), checkpoint.tokenizer_directory, checkpoint)
    path = local_copy(path)
    provider = model_from(path)
    stored = check_weights(Path(path))
    return _HuggingFace(path, provider, Path(path), next(iter(stored.values())).dtype)


def _tokenize(side: _Side, prompt: str) -> Tensor:
    """Return a prompt as token ids [1, n]."""
    tokens = load_tokenizer(str(side.tokenizer))(prompt)["input_ids"]
    if not tokens:
        raise UserError(f"--prompt '{prompt}' has no tokens; give some text")
    check_prompts([tokens], side.provider.vocab_size)
    return torch.tensor([tokens])


def _without_tied_head(weights: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    if config_from(settings).tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def _compare_tensors(one: _Side, other: _Side, tolerance: float) -> list[_Row]:
    """Return one row per kind of tensor, all layers together."""
    rows: dict[str, _Row] = {}
    for name in dict.fromkeys([*one.weights, *other.weights]):
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if name not in one.weights or name not in other.weights:
            missing = other if name in one.weights else one
            difference, remark = math.inf, f"missing in {missing.path}"
        else:
            difference, remark = (
                _difference(one.weights[name], other.weights[name]),
                f"the first that differs is {name}",
            )
        row = rows.setdefault(kind, _Row(kind, 0, 0.0, True))
        row.count += 1
        row.difference = max(row.difference, difference)
        if difference > tolerance:
            row.equal, row.remark = False, row.remark or remark
    return list(rows.values())


def _compare_ar_logits(one: _Side, other: _Side, tokens: Tensor, tolerance: float) -> _Row:
    """Return the row of the AR logits; two implementations may differ by rounding."""
    logits, other_logits = one.ar_logits(tokens), other.ar_logits(tokens)
    difference = _difference(logits, other_logits)
    if type(one) is type(other):
        return _row("AR logits", difference, tolerance)
    rounding = ROUNDING * torch.finfo(one.provider.params_dtype).eps * float(logits.abs().max())
    row = _row("AR logits", difference, max(tolerance, rounding))
    row.remark = f"Transformers and Megatron; rounding is allowed up to {rounding:.1e}"
    return row


def _row(name: str, difference: float, tolerance: float) -> _Row:
    return _Row(name, 1, difference, difference <= tolerance)


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinite for other shapes or dtypes, or where an element is NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    difference = float((a.float() - b.float()).abs().max())
    return math.inf if math.isnan(difference) else difference


def _print(rows: list[_Row], a: str, b: str) -> None:
    table = Table("what", "tensors", "largest difference", "equal", title=f"{a} and {b}", title_justify="left")
    for row in rows:
        table.add_row(row.name, str(row.count), f"{row.difference:.3g}", "yes" if row.equal else "no")
    out = Console()
    out.print(table)
    for row in rows:
        if row.remark:
            out.print(f"{row.name}: {row.remark}", soft_wrap=True)
