"""Likelihood of text under a model: AR perplexity, and the bound of block diffusion."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import batched

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from nemodiff_train.console import progress_bar
from nemodiff_train.decoding.finite import check_finite
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.decoding.session import check_prompts
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.settings import check_scoring
from nemodiff_train.model.head import LOGIT_CHUNK, output_processor, token_losses
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.sample import Sample, SampleMaker
from nemodiff_train.runtime.memory import require_memory

NO_TOKEN = -1
"""Label after the end of a text."""


@dataclass(frozen=True)
class Likelihood:
    """Losses of some text in nats per token; perplexities to base e."""

    tokens: int
    """Number of tokens that were predicted."""
    ar_loss: float | None
    """Mean of -log p(next token); None for a model that was trained without AR loss."""
    diffusion_loss: float
    """Mean over draws of the negative evidence lower bound: the sum over blocks of 1/t-weighted losses, with
    t ~ U(0.001, 1) per block (BD3-LM, arXiv 2503.09573, section 3). In expectation never below the true negative log
    likelihood."""
    diffusion_error: float
    """Standard error of that mean, from the spread of the draws; NaN for one draw."""
    draws: int
    """Noise draws per text."""

    @property
    def ar_perplexity(self) -> float | None:
        """Return exp(AR loss)."""
        return None if self.ar_loss is None else math.exp(self.ar_loss)

    @property
    def diffusion_perplexity(self) -> float:
        """Return exp(diffusion loss), an upper bound."""
        return math.exp(self.diffusion_loss)

    def figures(self) -> dict[str, float | None]:
        """Return every field and both perplexities, for JSON; the error of one draw is None."""
        return {
            **asdict(self),
            "diffusion_error": None if math.isnan(self.diffusion_error) else self.diffusion_error,
            "ar_perplexity": self.ar_perplexity,
            "diffusion_perplexity": self.diffusion_perplexity,
        }


def likelihood(
    model: list[GPTModel],
    texts: Iterable[Sequence[int]],
    *,
    length: int,
    draws: int,
    batch_size: int = 8,
    seed: int = 0,
) -> Likelihood:
    """Score texts as training would, without learning from them.

    Each text is cut into samples of ``length`` tokens; the AR half reads the first token of a sample and does not
    predict it.

    Args:
        model: Chunks of a :class:`~nemodiff_train.model.loading.LoadedModel`, on one pipeline stage.
        texts: Token ids of each text.
        length: L, a multiple of the model's block size.
        draws: Noise draws per sample.
        batch_size: Samples scored together.
        seed: Seed of the noise.

    Raises:
        UserError: No text, no draws, a length that does not fit, or a model without a joint stage.
    """
    config = PipelineRunner(model).config
    check_scoring(vars(config), length, draws, seed)
    assert config.mask_token_id is not None
    samples = _samples([text for text in texts if len(text) > 1], length, config.vocab_size)
    device = next(model[0].parameters()).device
    rows = min(batch_size, len(samples))
    require_memory(  # a layer's activations at both halves' positions, and some of their logits twice, in fp32
        rows * 2 * length * config.hidden_size * 32 + LOGIT_CHUNK[device.type] * config.vocab_size * 8,
        device,
        f"the states of {rows:,} samples of {length:,} tokens",
        "use a smaller --batch-size or --length",
    )
    objective = ObjectiveConfig(
        block_size=config.block_size,
        shift=config.shift,
        clean_attention="block_causal" if config.clean_attention == "block_causal" else "causal",
        noise_granularity="block",
        seed=seed,
    )
    maker = SampleMaker(objective=objective, mask_token_id=config.mask_token_id)
    sums = torch.zeros(draws, 4, dtype=torch.float64)  # per draw, the sums of _score
    trained_views, config.noisy_views = config.noisy_views, 1  # [noisy | clean], whatever it was trained on
    try:
        with progress_bar() as progress:
            bar = progress.add_task("scoring", total=draws * len(samples))
            for draw in range(draws):
                for numbers in batched(range(len(samples)), batch_size):
                    noised = [maker.make(samples[number], 1, number * draws + draw) for number in numbers]
                    batch = {name: torch.stack([row[name] for row in noised]) for name in noised[0]}
                    sums[draw] += _score(model[0], batch, config.shift)
                    progress.update(bar, advance=len(numbers))
    finally:
        config.noisy_views = trained_views
    ar, ar_targets, _, tokens = sums[0].tolist()  # the same in every draw
    means = sums[:, 2] / tokens  # [draws]
    return Likelihood(
        tokens=int(tokens),
        ar_loss=ar / ar_targets if config.clean_attention == "causal" else None,
        diffusion_loss=float(means.mean()),
        diffusion_error=float(means.std() / math.sqrt(draws)) if draws > 1 else math.nan,
        draws=draws,
    )


def _samples(texts: Sequence[Sequence[int]], length: int, vocab_size: int) -> list[Sample]:
    """Cut texts of 2 tokens or more into samples; the last one of each is padded with positions that do not count."""
    if not texts:
        raise UserError("there is no text to score: every document is shorter than 2 tokens; give longer text")
    check_prompts(texts, vocab_size)
    samples = []
    for text in texts:
        for start in range(0, len(text) - 1, length):
            tokens = torch.tensor(text[start : start + length + 1])
            padded = F.pad(tokens, (0, length + 1 - len(tokens)), value=NO_TOKEN)  # [length + 1]
            loss_mask = (padded[:-1] != NO_TOKEN).float()
            samples.append({"tokens": padded[:-1].clamp(min=0), "labels": padded[1:], "loss_mask": loss_mask})
    return samples


def _score(chunk: GPTModel, batch: Sample, shift: bool) -> Tensor:
    """Return [4] fp64 sums over a batch of samples.

    They are the AR losses, the number of tokens that these predict, the bound of block diffusion, and the number of
    tokens that it is over.
    """
    device = next(chunk.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    labels = batch["labels"]
    indices = torch.arange(labels.numel(), device=device)

    def losses_of(states: Tensor, layer: ColumnParallelLinear, weight: Tensor) -> Tensor:
        return token_losses(states, labels, indices, batch["loss_mask"], chunk.config.vocab_size, layer, weight)

    def forward() -> Tensor:
        """Return [batch, 2L] cross-entropies: the noisy half, then the clean half."""
        with torch.inference_mode():
            process = output_processor(losses_of)
            losses: Tensor = chunk(batch["tokens"], batch["position_ids"], None, output_processor=process)
            return losses.double()

    losses = forward()
    check_finite(losses, [chunk], batch["position_ids"], forward, "losses")
    # [batch, L] AR losses of the clean half; the last token of a text predicts nothing.
    counts = batch["maskable"]
    length = counts.shape[1]
    clean = losses[:, length:]
    ar_targets = counts & (labels[:, length:] != NO_TOKEN)
    bound = (losses * batch["loss_mask"])[:, :length].sum()
    if shift:
        # The clean position before a block predicts its first token, and diffusion does not: [batch, L].
        block = batch["segment_ids"][:, 1]
        before_block = torch.zeros_like(ar_targets)
        before_block[:, :-1] = (block[:, 1:] != block[:, :-1]) & counts[:, 1:]
        bound = bound + (clean * before_block).sum()
    scores = torch.stack([(clean * ar_targets).sum(), ar_targets.sum(), bound, counts.sum()])
    return scores.double().cpu()
