"""``nemodiff convert verify``: compare two checkpoints, tensor by tensor and by their logits."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice

import torch
from megatron.core.models.gpt import GPTModel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from nemodiff_train.console import PlainConsole, console, quiet
from nemodiff_train.conversion.comparison import StoredWeights, reference
from nemodiff_train.conversion.exporting import full_tensors
from nemodiff_train.conversion.importing import build, load_weights
from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.session import Session, TokenLayout, check_prompts
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.families import HFConfig, ar_settings
from nemodiff_train.model.hf_directory import HFDirectory
from nemodiff_train.model.loading import load_model, set_dtype, start_model_parallel
from nemodiff_train.model.pretrained import config_from, model_from
from nemodiff_train.model.provider import TriModeModelProvider

ROUNDING = 128
"""Allowed difference of fp32 logits between two implementations, which add the same numbers in another order.

In units of the spacing of numbers at the largest logit."""

POSITIONS = 64
"""Positions whose logits are compared: half of them from 0 on, half far after them."""

PROMPT = "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the Moon: def area(r): return r"


def verify(a: str, b: str, *, tolerance: float = 0.0, prompt: str = PROMPT) -> bool:
    """Compare every tensor of two checkpoints, and their logits on a prompt; print a table.

    Logits are computed in fp32, one checkpoint after the other; AR logits of a Hugging Face directory are computed by
    Transformers, all others by Megatron.

    Args:
        a: Hugging Face directory or Megatron checkpoint.
        b: The other one.
        tolerance: Largest difference of an element of weights, and of logits by one implementation.
        prompt: Text for the logits; it is repeated to fill ``POSITIONS``.

    Returns:
        Whether all differences are within the tolerance.

    Raises:
        UserError: One of them cannot be read, or the prompt has no tokens.
    """
    start_model_parallel(1)
    with quiet():
        sides = [_verified(side) for side in [_open_side(path) for path in (a, b)]]
        tokens, positions = _tokenize(sides[0], prompt), _positions(sides[0])
        with console.status("comparing tensors"):
            rows = _compare_tensors(sides[0], sides[1], tolerance)
        masked = next((side.provider for side in sides if side.provider.mask_token_id is not None), None)
        ar_logits, diffusion_logits = [], []
        for side in sides:
            with console.status(Text(f"computing the logits of {side.source}")):
                ar_logits.append(side.ar_logits(tokens, positions))
                if masked:
                    diffusion_logits.append(side.diffusion_logits(tokens, masked))
                side.free()
    difference, limit, remark = _difference(*ar_logits), tolerance, ""
    if type(sides[0].source) is not type(sides[1].source):
        rounding = ROUNDING * torch.finfo(torch.float32).eps * float(ar_logits[0].abs().max())
        limit = max(tolerance, rounding)
        remark = f"Transformers and Megatron in fp32; rounding is allowed up to {rounding:.1e}"
    rows.append(_Row("AR logits", 1, difference, difference <= limit, remark))
    if masked:
        difference = _difference(*diffusion_logits)
        rows.append(_Row("block-diffusion logits", 1, difference, difference <= tolerance))
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
class _Side:
    """One of the two checkpoints."""

    source: Checkpoint | HFDirectory
    provider: TriModeModelProvider
    dtype: torch.dtype
    """Dtype of the weights as they are stored."""

    @property
    def ar_config(self) -> HFConfig:
        """Return the ``config.json`` of the AR model."""
        return ar_settings(self.provider.hf_config)

    @cached_property
    def chunks(self) -> list[GPTModel]:
        """Return the Megatron model with its weights in fp32."""
        if isinstance(self.source, Checkpoint):
            return load_model(self.source, dtype=torch.float32).chunks
        set_dtype(self.provider, torch.float32)
        chunks = build(self.provider)
        load_weights(chunks, self.source, f"reading {self.source}")
        return chunks

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Return the tensors of the AR model by name, without a tied output layer."""
        if isinstance(self.source, Checkpoint):
            return dict(full_tensors(self.chunks, self.ar_config))
        return StoredWeights(self.source, torch.float32)

    def ar_logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the fp32 logits [1, n, vocabulary] of a causal forward over tokens [1, n] at positions [1, n].

        Those of a Hugging Face directory are computed by Transformers.
        """
        if isinstance(self.source, HFDirectory):
            model = reference(self.source, torch.float32)
            mask = torch.ones_like(tokens)  # without it, a jump of positions would begin another text
            with torch.inference_mode():
                logits: Tensor = model(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
            return logits
        session = Session(self.chunks, 1, tokens.shape[1], None)
        causal = torch.ones(1, tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=session.device).tril()
        layout = TokenLayout(positions.to(session.device), causal, int(positions.max()) + 1)
        return session.forward(tokens.to(session.device), torch.arange(1), "verify", layout=layout).cpu()

    def diffusion_logits(self, tokens: Tensor, masked: TriModeModelProvider) -> Tensor:
        """Return the fp32 logits [1, k, vocabulary] of a block of mask tokens after tokens [1, n].

        Args:
            tokens: The prompt.
            masked: Names the mask token and the size of a block.
        """
        assert masked.mask_token_id is not None  # the caller found one that has it
        session = Session(self.chunks, 1, tokens.shape[1] + masked.block_size, None)
        session.prefill(tokens.tolist())
        block = torch.full((1, masked.block_size), masked.mask_token_id, device=session.device)
        return session.forward(block, torch.arange(1), "denoise").cpu()

    def free(self) -> None:
        """Free the model; the other one is next."""
        vars(self).pop("weights", None)
        vars(self).pop("chunks", None)


def _open_side(path: str) -> _Side:
    if checkpoint := Checkpoint.find(path):
        return _side_of(checkpoint)
    directory = HFDirectory.open(path)
    provider = model_from(str(directory.path))
    check_weights(directory)
    return _Side(directory, provider, directory.dtype)


def _side_of(checkpoint: Checkpoint) -> _Side:
    provider = model_from(checkpoint.require_model())
    return _Side(checkpoint, provider, provider.params_dtype)


def _verified(side: _Side) -> _Side:
    """Read every byte of a Megatron checkpoint; return the side of its newest iteration that is intact."""
    if not isinstance(side.source, Checkpoint):
        return side
    with console.status(Text(f"verifying {side.source.path}")):
        verified = side.source.verify_contents()
    return side if verified is side.source else _side_of(verified)


def _tokenize(side: _Side, prompt: str) -> Tensor:
    """Return a prompt, repeated, as token ids [1, n]."""
    directory = side.source.tokenizer_directory if isinstance(side.source, Checkpoint) else side.source.path
    tokens = load_tokenizer(str(directory))(prompt)["input_ids"]
    if not tokens:
        raise UserError(f"--prompt '{prompt}' has no tokens; give some text")
    check_prompts([tokens], side.provider.vocab_size)
    return torch.tensor([list(islice(cycle(tokens), POSITIONS))])


def _positions(side: _Side) -> Tensor:
    """Return the positions [1, n] of the tokens: the first ones, and those before the end of the context.

    Rope scalings and Ministral 3's query scale show far from the start alone.  Beyond twice the length that they
    scale, the angles of fast frequencies would differ by rounding.
    """
    config = config_from(side.ar_config)
    original = (getattr(config, "rope_parameters", None) or {}).get("original_max_position_embeddings") or 0
    end = min(int(config.max_position_embeddings), max(8192, 2 * original))
    near = torch.arange(POSITIONS // 2)
    return torch.cat([near, near + max(end, POSITIONS) - POSITIONS // 2])[None]


def _compare_tensors(one: _Side, other: _Side, tolerance: float) -> list[_Row]:
    """Return one row per kind of tensor, all layers together."""
    rows: dict[str, _Row] = {}
    for name in dict.fromkeys([*one.weights, *other.weights]):
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if name not in one.weights or name not in other.weights:
            missing = other if name in one.weights else one
            difference, remark = math.inf, f"missing in {missing.source}"
        elif one.dtype != other.dtype:
            difference, remark = math.inf, f"stored as {one.dtype} and {other.dtype}"
        else:
            difference = _difference(one.weights[name], other.weights[name])
            remark = f"the first that differs is {name}"
        row = rows.setdefault(kind, _Row(kind, 0, 0.0, True))
        row.count += 1
        row.difference = max(row.difference, difference)
        if difference > tolerance:
            row.equal, row.remark = False, row.remark or remark
    return list(rows.values())


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinite for other shapes, or where an element is NaN."""
    if a.shape != b.shape:
        return math.inf
    difference = float((a.float() - b.float()).abs().max())
    return math.inf if math.isnan(difference) else difference


def _print(rows: list[_Row], a: str, b: str) -> None:
    table = Table("what", "tensors", "largest difference", "equal", title=f"{a} and {b}", title_justify="left")
    for row in rows:
        table.add_row(row.name, str(row.count), f"{row.difference:.3g}", "yes" if row.equal else "no")
    out = PlainConsole()
    out.print(table)
    for row in rows:
        if row.remark:
            out.print(f"{row.name}: {row.remark}", soft_wrap=True)
