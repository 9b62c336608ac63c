"""How probable a model finds a text: AR perplexity, and the bound that block diffusion gives."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.console import progress_bar
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.errors import UserError
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.loss import sums
from nemodiff_train.objective.sample import Sample, SampleMaker

NO_TOKEN = -1
"""Label behind the end of a text."""


@dataclass(frozen=True)
class Likelihood:
    """Figures of one text; nats a token, natural perplexities."""

    tokens: int
    """Tokens that were predicted."""
    ar_loss: float | None
    """Mean of -log p(next token); None for a model that was trained without AR loss."""
    diffusion_loss: float
    """Mean over draws of the negative evidence lower bound: the sum of 1/t losses over blocks, t ~ U(0.001, 1) a
    block (BD3-LM, arXiv 2503.09573, section 3). Never below the true negative log likelihood, in expectation."""
    diffusion_error: float
    """Standard error of that mean, from the spread of the draws; NaN for one draw."""
    draws: int
    """Noise draws of each text."""

    @property
    def ar_perplexity(self) -> float | None:
        """exp(AR loss)."""
        return None if self.ar_loss is None else math.exp(self.ar_loss)

    @property
    def diffusion_perplexity(self) -> float:
        """exp(diffusion loss), an upper bound."""
        return math.exp(self.diffusion_loss)

    def figures(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {
            **asdict(self),
            "ar_perplexity": self.ar_perplexity,
            "diffusion_perplexity": self.diffusion_perplexity,
        }


def likelihood(
    model: list[Any], texts: Iterable[Sequence[int]], *, length: int, draws: int, batch_size: int = 8, seed: int = 0
) -> Likelihood:
    """Score texts as training would, without learning from them.

    Each text is cut into samples of ``length`` tokens; the first token of a sample is read, not predicted, by
    the AR half.

    Args:
        model: What :func:`~nemodiff_train.model.loading.load_for_decoding` returned, on one pipeline stage.
        texts: Token ids of each text.
        length: L, a multiple of the model's block size.
        draws: Noise draws of each sample.
        batch_size: Samples scored together.
        seed: Of the noise.

    Raises:
        UserError: No text, no draws, a length that does not fit, or a model without a joint stage.
    """
    config = PipelineRunner(model).config
    _check(config, length, draws)
    objective = ObjectiveConfig(
        block_size=config.block_size,
        shift=config.shift,
        clean_attention=config.clean_attention,
        noise_granularity="block",
        seed=seed,
    )
    maker = SampleMaker(objective=objective, mask_id=config.mask_token_id)
    samples = [part for text in texts for part in _samples(text, length)]
    if not samples:
        raise UserError("there is no text to score: every document is shorter than 2 tokens")
    totals = torch.zeros(draws, dtype=torch.float64)
    ar = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    with progress_bar() as progress:
        bar = progress.add_task("scoring", total=draws * len(samples))
        for draw in range(draws):
            for numbers in batched(range(len(samples)), batch_size):
                made = [maker.make(samples[number], 1, number * draws + draw) for number in numbers]
                found = _score(model[0], {name: torch.stack([each[name] for each in made]) for name in made[0]})
                # With the shift a block's first place is predicted by the clean place before it, not by diffusion.
                totals[draw] += float(found.diffusion) + (float(found.seeds) if config.shift else 0.0)
                if draw == 0:
                    ar += torch.tensor([float(found.ar), float(found.targets)], dtype=torch.float64)
                    tokens += int(found.tokens)
                progress.update(bar, advance=len(numbers))
    means = totals / tokens
    error = float(means.std() / math.sqrt(draws)) if draws > 1 else math.nan
    causal = config.clean_attention == "causal"
    return Likelihood(tokens, float(ar[0] / ar[1]) if causal else None, float(means.mean()), error, draws)


def _check(config: Any, length: int, draws: int) -> None:
    if config.mask_token_id is None:
        raise UserError("this checkpoint has had no joint stage; its diffusion bound is not defined")
    if draws < 1:
        raise UserError(f"the number of draws must be at least 1, not {draws}")
    if length < 2 or length % config.block_size:
        raise UserError(f"the length {length} is not a multiple of the model's block size {config.block_size}")


def _samples(text: Sequence[int], length: int) -> list[Sample]:
    """A text in parts of ``length`` tokens; the last is padded with places that do not count."""
    parts = []
    for start in range(0, len(text), length):
        own = torch.tensor(text[start : start + length + 1])
        if len(own) < 2:
            continue
        places = min(len(own), length)
        padded = F.pad(own, (0, length + 1 - len(own)), value=NO_TOKEN)
        counts = (torch.arange(length) < places).float()
        parts.append({"tokens": padded[:-1].clamp(min=0), "labels": padded[1:], "loss_mask": counts})
    return parts


@dataclass(frozen=True)
class _Scores:
    ar: Tensor
    targets: Tensor
    diffusion: Tensor
    seeds: Tensor
    tokens: Tensor


def _score(chunk: Any, batch: Sample) -> _Scores:
    """Sums over one batch of samples."""
    device = next(chunk.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.inference_mode():
        losses = chunk(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"]).double()
    found = sums(losses, batch, 1)
    length = batch["maskable"].shape[1]
    clean, counts = losses[:, length:], batch["maskable"]
    targets = counts & (batch["labels"][:, length:] != NO_TOKEN)
    block = batch["segment_ids"][:, 1]
    before_block = torch.zeros_like(targets)
    before_block[:, :-1] = (block[:, 1:] != block[:, :-1]) & counts[:, 1:]
    return _Scores(
        ar=(clean * targets).sum(),
        targets=targets.sum(),
        diffusion=found.diffusion,
        seeds=(clean * before_block).sum(),
        tokens=found.tokens,
    )
