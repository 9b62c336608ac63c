"""``nemodiff convert verify``: whether two checkpoints hold the same model."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemodiff_train.console import console, quiet
from nemodiff_train.conversion.exporting import tensors
from nemodiff_train.conversion.headers import opened
from nemodiff_train.conversion.importing import build, load_weights, take_dtype
from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.session import Session
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.families import ar_settings, architecture, stored_name
from nemodiff_train.model.loading import load_for_decoding, start_model_parallel
from nemodiff_train.model.pretrained import config_from, local_copy, model_from, stored_settings
from nemodiff_train.model.provider import TriModeModelProvider

# Two implementations add the same numbers up in another order; in units of the dtype's spacing at the largest logit.
ROUNDING = 32


def verify(a: str, b: str, *, tolerance: float = 0.0, prompt: str = "The quick brown fox") -> bool:
    """Compare every tensor of two checkpoints, and their logits on a prompt; prints a table.

    Autoregressive logits of a Hugging Face directory are Transformers', so that comparing it with what was
    imported from it also compares the two implementations: these may differ by rounding.

    Args:
        a: Hugging Face directory or Megatron checkpoint.
        b: The other one.
        tolerance: Largest difference of an element, of weights and of logits of one implementation.
        prompt: Text that both read.

    Returns:
        Whether they are equal within the tolerance.

    Raises:
        UserError: One of them cannot be read, or the prompt has no tokens.
    """
    start_model_parallel(1)
    with quiet():
        one, other = _side(a), _side(b)
        tokens = _tokens(one, prompt)
        with console.status("comparing tensors"):
            rows = _compare_tensors(one, other, tolerance)
        with console.status("comparing logits"):
            rows.append(
                _compare_logits("AR logits", one.ar_logits(tokens), other.ar_logits(tokens), one, other, tolerance)
            )
            if (masked := next((side for side in (one, other) if side.mask_token is not None), None)) is not None:
                found = [side.diffusion_logits(tokens, masked) for side in (one, other)]
                rows.append(_row("block-diffusion logits", 1, _difference(*found), tolerance))
    _print(rows, a, b)
    return all(row.equal for row in rows)


@dataclass
class _Row:
    name: str
    count: int
    difference: float
    equal: bool
    remark: str = ""


@dataclass
class _Side:
    """One of the two checkpoints."""

    path: str
    provider: TriModeModelProvider
    tokenizer: Path

    @property
    def mask_token(self) -> int | None:
        return self.provider.mask_token_id

    @property
    def block_size(self) -> int:
        return self.provider.block_size

    @property
    def settings(self) -> dict[str, Any]:
        """Of the AR model."""
        return ar_settings(self.provider.hf_config)

    @cached_property
    def megatron(self) -> list[Any]:
        """The Megatron model with its weights."""
        raise NotImplementedError

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Tensors of the AR model by name; a tied output layer is left out."""
        raise NotImplementedError

    def ar_logits(self, tokens: Tensor) -> Tensor:
        """[1, tokens, vocabulary] logits of a causal forward, fp32."""
        return self._session(tokens).forward(tokens, torch.zeros(1, dtype=torch.long), "verify", causal=True)

    def diffusion_logits(self, tokens: Tensor, masked: "_Side") -> Tensor:
        """[1, block, vocabulary] logits of a block of masks behind a prompt, fp32; ``masked`` says what a mask is."""
        assert masked.mask_token is not None  # the caller has found one
        session = self._session(tokens, masked.block_size)
        session.prefill(tokens.tolist())
        block = torch.full((1, masked.block_size), masked.mask_token, device=session.device)
        return session.forward(block, torch.zeros(1, dtype=torch.long, device=session.device), "denoise")

    def _session(self, tokens: Tensor, more: int = 0) -> Session:
        return Session(self.megatron, 1, tokens.shape[1] + more, None)


@dataclass
class _Megatron(_Side):
    checkpoint: Checkpoint

    @cached_property
    def megatron(self) -> list[Any]:
        return load_for_decoding(self.checkpoint)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        found = dict(tensors(self.megatron, self.settings))
        return _without_tied_head(found, self.settings)


@dataclass
class _HuggingFace(_Side):
    dtype: str = field(default="F32")

    @cached_property
    def megatron(self) -> list[Any]:
        take_dtype(self.provider, self.dtype)
        models = build(self.provider)
        load_weights(models, self.path, f"reading {self.path}")
        return models

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        kind = architecture(stored_settings(self.path))
        stored = check_weights(Path(self.path))
        own = {stored_name(kind, name): name for name in self._names()}
        found = {}
        for name, tensor in stored.items():
            with opened(tensor.file) as content:
                found[own[name]] = content.get_tensor(name)
        return _without_tied_head(found, self.settings)

    def ar_logits(self, tokens: Tensor) -> Tensor:
        model = self._empty("cpu")
        model.load_state_dict(self.weights, strict=False, assign=True)
        model.tie_weights()
        with torch.inference_mode():
            logits: Tensor = model.eval()(tokens).logits
        return logits.float()

    def _names(self) -> list[str]:
        return list(self._empty("meta").state_dict())

    def _empty(self, device: str) -> Any:
        config = config_from(self.settings)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config)


def _side(path: str) -> _Side:
    if checkpoint := Checkpoint.find(path):
        return _Megatron(path, model_from(checkpoint), checkpoint.tokenizer_directory, checkpoint)
    path = local_copy(path)
    provider = model_from(path)
    stored = check_weights(Path(path))
    return _HuggingFace(path, provider, Path(path), next(iter(stored.values())).dtype)


def _tokens(side: _Side, prompt: str) -> Tensor:
    tokens = load_tokenizer(str(side.tokenizer))(prompt)["input_ids"]
    if not tokens:
        raise UserError(f"--prompt '{prompt}' has no tokens; give some text")
    return torch.tensor([tokens])


def _without_tied_head(found: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    if config_from(settings).tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def _compare_tensors(one: _Side, other: _Side, tolerance: float) -> list[_Row]:
    """A row for each kind of tensor, all layers together."""
    rows: dict[str, _Row] = {}
    for name in dict.fromkeys([*one.weights, *other.weights]):
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if name not in one.weights or name not in other.weights:
            missing = other if name in one.weights else one
            found = _Row(kind, 1, float("inf"), False, f"missing in {missing.path}")
        else:
            found = _row(kind, 1, _difference(one.weights[name], other.weights[name]), tolerance)
        if not found.equal and not found.remark:
            found.remark = f"the first that differs is {name}"
        known = rows.setdefault(kind, _Row(kind, 0, 0.0, True))
        known.count += 1
        known.difference = max(known.difference, found.difference)
        known.equal &= found.equal
        known.remark = known.remark or found.remark
    return list(rows.values())


def _compare_logits(name: str, a: Tensor, b: Tensor, one: _Side, other: _Side, tolerance: float) -> _Row:
    if type(one) is type(other):
        return _row(name, 1, _difference(a, b), tolerance)
    spacing = torch.finfo(one.provider.params_dtype).eps * float(a.abs().max())
    found = _row(name, 1, _difference(a, b), max(tolerance, ROUNDING * spacing))
    found.remark = f"Transformers and Megatron; rounding is allowed up to {ROUNDING * spacing:.1e}"
    return found


def _row(name: str, count: int, difference: float, tolerance: float) -> _Row:
    return _Row(name, count, difference, difference <= tolerance)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite for other shapes or dtypes, or where one is no number."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    found = float((a.float() - b.float()).abs().max())
    return found if found == found else float("inf")


def _print(rows: list[_Row], a: str, b: str) -> None:
    table = Table("what", "tensors", "largest difference", "equal", title=f"{a} and {b}", title_justify="left")
    for row in rows:
        table.add_row(row.name, str(row.count), f"{row.difference:.3g}", "yes" if row.equal else "no")
    out = Console()
    out.print(table)
    for row in rows:
        if row.remark:
            out.print(f"{row.name}: {row.remark}", soft_wrap=True)
