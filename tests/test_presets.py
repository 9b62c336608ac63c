"""Each preset against its paper's formula, written out block by block on a small transformer of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.errors import UserError
from nemodiff_train.objective import ObjectiveConfig, noise
from nemodiff_train.objective.loss import loss_weights
from nemodiff_train.objective.presets import PRESETS, preset
from nemodiff_train.objective.rule import can_attend
from nemodiff_train.objective.sample import SampleMaker
from nemodiff_train.objective.schedule import block_size_at
from nemodiff_train.validation.objective import objective_problems
from tests import small

LENGTH, VOCABULARY, WIDTH, MASK = 128, 12, 8, 11


class Transformer(torch.nn.Module):
    """Two layers of attention under any mask, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5)

        self.tokens, self.positions = parameter(VOCABULARY, WIDTH), parameter(LENGTH, WIDTH)
        self.layers = torch.nn.ParameterList([parameter(4, WIDTH, WIDTH) for _ in range(2)])
        self.head = parameter(VOCABULARY, WIDTH)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens[tokens] + self.positions[positions]
        for q, k, v, w in self.layers:
            scores = (x @ q) @ (x @ k).T
            x = x + torch.tanh(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ (x @ v) @ w)
        return x @ self.head.T


def ours(model: Transformer, batch: list[dict[str, Tensor]], objective: ObjectiveConfig) -> Tensor:
    """The library: samples, rule and reduction, one sample a micro-batch."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in batch:
        document, block, _ = sample["segment_ids"]
        everything = small.sample_positions(objective.views, block, document)
        table = can_attend(everything.as_queries(), everything.as_keys(), objective.clean_attention == "block_causal")
        losses = F.cross_entropy(
            model(sample["tokens"], sample["position_ids"], table), sample["labels"], reduction="none"
        )
        batch_of_one = {name: value[None] for name, value in sample.items()}
        weights, denominator = loss_weights(batch_of_one, objective, objective.alpha, 1.0)
        total, count = total + (losses * weights).sum(), count + int(denominator)
    return total / count


class Text:
    """One sample as the papers see it: a text x_0 .. x_L, and in each view noisy tokens with a level by block."""

    def __init__(self, model: Transformer, sample: dict[str, Tensor], views: int, block_size: int) -> None:
        self.model, self.block_size = model, block_size
        self.clean = sample["tokens"][-LENGTH:]
        self.after = sample["labels"][-1:]
        self.noisy = sample["tokens"][:-LENGTH].view(views, LENGTH)
        self.masked = self.noisy == MASK
        self.starts = range(0, LENGTH, block_size)

    def ar(self) -> Tensor:
        """[L] -log p(x_{i+1} | x_{<=i})."""
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        logits = self.model(self.clean, torch.arange(LENGTH), causal)
        return F.cross_entropy(logits, torch.cat([self.clean[1:], self.after]), reduction="none")

    def block(self, start: int, view: int, block_causal: bool) -> Tensor:
        """[block, vocabulary] logits of one noisy block after its clean prefix."""
        end = min(start + self.block_size, LENGTH)
        position = torch.arange(end)
        prefix = position[None, :] <= position[:, None]
        if block_causal:
            prefix = position[None, :] // self.block_size <= position[:, None] // self.block_size
        sees = torch.where(position[:, None] < start, prefix, torch.ones((), dtype=torch.bool))
        return self.model(torch.cat([self.clean[:start], self.noisy[view, start:end]]), position, sees)[start:]

    def masked_loss(
        self, view: int, block_causal: bool, weight: Callable[[int], float] = lambda start: 1.0
    ) -> Tensor:
        """Sum over blocks of weight(start) x the cross-entropy of masked positions."""
        total = torch.zeros((), dtype=torch.float64)
        for start in self.starts:
            own = slice(start, start + self.block_size)
            losses = F.cross_entropy(self.block(start, view, block_causal), self.clean[own], reduction="none")
            total = total + weight(start) * losses[self.masked[view, own]].sum()
        return total


def texts_and_levels(model: Transformer, batch: list[dict[str, Tensor]], objective: ObjectiveConfig) -> Any:
    for index, sample in enumerate(batch):
        text = Text(model, sample, objective.views, block_size_at(objective, index // len(batch)))
        yield text, (lambda start, level=sample["noise_level"]: 1 / float(level[start]))


def nemotron(model: Transformer, batch: Any, objective: ObjectiveConfig) -> Tensor:
    """Section 2.1: AR + 0.3 x sum of 1/t losses, averaged over all tokens of the batch."""
    parts = [
        t.ar().sum() + 0.3 * t.masked_loss(0, False, level) for t, level in texts_and_levels(model, batch, objective)
    ]
    return torch.stack(parts).sum() / (len(batch) * LENGTH)


def efficient_dlm(model: Transformer, batch: Any, objective: ObjectiveConfig) -> Tensor:
    """Block-wise diffusion with clean context: sum of 1/t losses, no AR loss, a clean half of whole blocks."""
    parts = [t.masked_loss(0, True, level) for t, level in texts_and_levels(model, batch, objective)]
    return torch.stack(parts).sum() / (len(batch) * LENGTH)


def tidar(model: Transformer, batch: Any, objective: ObjectiveConfig) -> Tensor:
    """Section 3: (a x mean AR + mean diffusion) / (1 + a) at a = 1, every position masked."""
    found = list(texts_and_levels(model, batch, objective))
    assert all(text.masked.all() for text, _ in found)
    ar = torch.cat([text.ar() for text, _ in found]).mean()
    diffusion = torch.stack([text.masked_loss(0, False) for text, _ in found]).sum() / (len(batch) * LENGTH)
    return (ar + diffusion) / (1 + 1)


def set_block(model: Transformer, batch: Any, objective: ObjectiveConfig) -> Tensor:
    """Next-token losses plus the losses of masked positions, unweighted, in blocks of the step's size."""
    found = list(texts_and_levels(model, batch, objective))
    assert 2 <= found[0][0].block_size <= 16
    return torch.stack([t.ar().sum() + t.masked_loss(0, False) for t, _ in found]).sum() / (len(batch) * LENGTH)


def fast_dllm_v2(model: Transformer, batch: Any, objective: ObjectiveConfig) -> Tensor:
    """Shifted, complementary views: every token is predicted once, by the position before it.

    Inside a block from the view that hides it; the first token of a block from the finished block before.
    """
    losses = []
    for text, _ in texts_and_levels(model, batch, objective):
        size = text.block_size
        assert torch.equal(text.masked[0], ~text.masked[1])
        position = torch.arange(LENGTH)
        whole_blocks = position[None, :] // size <= position[:, None] // size
        finished = model(text.clean, position, whole_blocks)
        targets = torch.cat([text.clean, text.after])
        for start in text.starts:
            losses.append(F.cross_entropy(finished[start + size - 1], targets[start + size]))
            for view in (0, 1):
                logits = text.block(start, view, True)
                for inside in range(1, size):
                    if text.masked[view, start + inside]:
                        losses.append(F.cross_entropy(logits[inside - 1], targets[start + inside]))
    assert len(losses) == len(batch) * LENGTH
    return torch.stack(losses).mean()


def bd3(model: Transformer, batch: Any, objective: ObjectiveConfig) -> Tensor:
    """The block NELBO under the linear schedule: 1/t losses block by block, t clipped, in blocks of 4."""
    assert all(0.45 <= float(level) <= 0.95 for sample in batch for level in sample["noise_level"])
    return efficient_dlm(model, batch, objective)


FORMULAS = [nemotron, efficient_dlm, tidar, set_block, fast_dllm_v2, bd3]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_a_preset_is_its_paper_s_formula(formula: Callable[..., Tensor]) -> None:
    """Loss and every parameter's gradient; weights are stored in float32, hence 1e-6."""
    objective = preset(formula.__name__)
    assert not [*objective_problems(objective, LENGTH)]
    draw = torch.Generator().manual_seed(3)
    maker = SampleMaker(objective=objective, mask_token_id=MASK, batch_size=2)
    batch = []
    for index in range(2):
        text = torch.randint(0, MASK, (LENGTH + 1,), generator=draw)
        plain = {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(LENGTH)}
        batch.append(maker.make(plain, 0, index))
    model = Transformer()
    values, gradients = [], []
    for statement in (ours, formula):
        loss = statement(model, batch, objective)
        values.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_every_preset_has_a_formula() -> None:
    assert set(PRESETS) == {formula.__name__ for formula in FORMULAS}
    with pytest.raises(UserError, match="nemotron"):
        preset("nemotrom")


def test_the_noise_is_the_reference_s_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron Bridge's own masking, fed the uniform numbers that ours drew."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from megatron.bridge.diffusion.common import dllm

    for index in range(20):
        key = noise.Key(1234, 0, index)
        own = noise._generator(key, 0, noise._MASKS, index)
        own.random()  # whether the sample is all masked
        numbers = [noise._generator(key, 0, noise._LEVELS, index).random(1), own.random((1, LENGTH))]
        feed = iter(torch.from_numpy(each) for each in numbers)
        monkeypatch.setattr(dllm.torch, "rand", lambda *size, feed=feed, **options: next(feed))
        text = torch.arange(LENGTH)[None]
        counts = (text % 7 != 3).long()
        _, masked, level = dllm.forward_process_simple_masking(text, MASK, loss_mask=counts)
        monkeypatch.undo()
        found = noise.draw_noise(
            key, counts[0].bool().numpy(), np.arange(LENGTH) // 32, ObjectiveConfig(), 32, 1, None
        )
        assert np.array_equal(found.masked, masked.numpy())
        np.testing.assert_allclose(found.level, level.numpy(), rtol=1e-6)
