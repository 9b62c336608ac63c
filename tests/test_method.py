"""The method, stated a second time: rule, kernels, noise, sample, reduction."""

import math

import numpy as np
import pytest
import torch

from nemodiff_train.attention import kernels
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.loss import report, weighted
from nemodiff_train.objective.noise import draw_noise
from nemodiff_train.objective.rule import dense_mask
from nemodiff_train.objective.sample import double

# (length, block): one block, blocks of one place, groups that end inside and at the end of the sequence.
SHAPES = [(16, 16), (8, 1), (96, 32), (256, 32), (320, 64), (256, 256)]


def brute_force(length: int, block: int) -> torch.Tensor:
    """The rule in plain words, place by place."""
    table = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            table[q, k] = q // block == k // block  # noisy sees its own noisy block
            table[q, length + k] = k // block < q // block  # noisy sees earlier clean blocks
            table[length + q, length + k] = k <= q  # clean is causal; clean never sees noisy
    return table


@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_the_rule_is_the_table(length: int, block: int) -> None:
    assert torch.equal(dense_mask(length, block), brute_force(length, block))


def states(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, 2 * length, 8), (2, 2, 2 * length, 8), (2, 2, 2 * length, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, scale: float | None) -> torch.Tensor:
    """Softmax attention written out, with the table as its mask."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill(~brute_force(q.shape[2] // 2, block), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_the_kernel_is_dense_attention_forward_and_backward(length: int, block: int, scale: float | None) -> None:
    ours, theirs = states(length), states(length)
    out, expected = kernels.doubled_sdpa(*ours, block, scale), dense(*theirs, block, scale)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-9)


def test_the_gpu_kernel_follows_the_rule() -> None:
    q, k, v = (s.detach().float() for s in states(128))
    torch.testing.assert_close(kernels.doubled_flex(q, k, v, 32), dense(q, k, v, 32, None), rtol=1e-4, atol=1e-5)


def test_noise_is_a_function_of_its_key() -> None:
    everywhere = np.ones(512, dtype=bool)
    first, again = (draw_noise((1, 0, 7), everywhere, 1e-3) for _ in range(2))
    assert np.array_equal(first.masked, again.masked) and np.array_equal(first.weight, again.weight)
    for other in ((2, 0, 7), (1, 1, 7), (1, 0, 8)):
        assert not np.array_equal(first.masked, draw_noise(other, everywhere, 1e-3).masked)


def test_masked_share_and_weights_over_many_draws() -> None:
    """E[t] = 0.5005, and E[weight] = 1 at every eligible place: the weight undoes the inclusion probability.

    Bounds are five standard errors: share has sd 0.29 a draw; the weight at one place has variance
    E[1/t] - 1 < 6, so its mean over the 64 places, which share t, has sd below 2.5.
    """
    eligible = np.ones(64, dtype=bool)
    eligible[::8] = False
    draws = [draw_noise((3, 0, index), eligible, 1e-3) for index in range(20_000)]
    shares = np.array([draw.masked[eligible].mean() for draw in draws])
    assert abs(shares.mean() - 0.5005) < 5 * shares.std() / math.sqrt(len(draws))
    weights = np.array([draw.weight[eligible].mean() for draw in draws])
    assert abs(weights.mean() - 1) < 5 * weights.std() / math.sqrt(len(draws))
    assert not any(draw.masked[~eligible].any() or draw.weight[~eligible].any() for draw in draws)


def test_all_masked_share() -> None:
    draws = [draw_noise((4, 0, index), np.ones(64, dtype=bool), 1e-3, 0.25) for index in range(4000)]
    full = sum(bool(draw.masked.all()) and draw.weight.max() == 1 for draw in draws)
    assert abs(full / 4000 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def sample(length: int = 64) -> dict[str, torch.Tensor]:
    text = torch.arange(20, 21 + length)
    counts = torch.ones(length)
    counts[3] = 0
    return {"tokens": text[:-1], "labels": text[1:], "loss_mask": counts, "position_ids": torch.arange(length)}


def test_the_doubled_sample() -> None:
    plain = sample()
    doubled = double(plain, (1, 0, 2), 5, ObjectiveConfig())
    masked = doubled["tokens"][:64] == 5
    assert 0 < masked.sum() < 64 and not masked[3]
    assert torch.equal(doubled["tokens"][:64][~masked], plain["tokens"][~masked])
    assert torch.equal(doubled["tokens"][64:], plain["tokens"])
    assert torch.equal(doubled["labels"], torch.cat([plain["tokens"], plain["labels"]]))
    assert torch.equal(doubled["loss_mask"][:64] > 0, masked)
    assert torch.equal(doubled["loss_mask"][64:], plain["loss_mask"])
    assert torch.equal(doubled["position_ids"], torch.arange(64).repeat(2))


def test_reduction_by_hand_and_over_any_micro_batching() -> None:
    masks = torch.stack([double(sample(), (1, 0, n), 5, ObjectiveConfig())["loss_mask"] for n in range(8)])
    losses = torch.rand(8, 128)
    ar = sum(float(losses[n, 64 + i] * masks[n, 64 + i]) for n in range(8) for i in range(64))
    diffusion = sum(float(losses[n, i] * masks[n, i]) for n in range(8) for i in range(64))
    whole = report(losses, masks, True, 0.3)
    assert whole["loss"][0].item() == pytest.approx(ar + 0.3 * diffusion, rel=1e-5)
    assert whole["ar loss"].tolist() == pytest.approx([ar, 8 * 63], rel=1e-5)
    assert whole["diffusion loss"].tolist() == pytest.approx([diffusion, 8 * 63], rel=1e-5)
    assert (losses * weighted(masks, True, 0.3)).sum().item() == pytest.approx(ar + 0.3 * diffusion, rel=1e-5)
    for size in (1, 2, 4):
        parts = [
            report(some, mask, True, 0.3) for some, mask in zip(losses.split(size), masks.split(size), strict=True)
        ]
        for name, total in whole.items():
            torch.testing.assert_close(sum(part[name] for part in parts), total, rtol=1e-5, atol=1e-5)


def test_the_shifted_sample() -> None:
    """Place i predicts token i + 1 where that is masked and in the same block."""
    plain, objective = sample(), ObjectiveConfig(block_size=16, shift=True)
    shifted, usual = (double(plain, (1, 0, 2), 5, o) for o in (objective, ObjectiveConfig(block_size=16)))
    assert torch.equal(shifted["tokens"], usual["tokens"])
    assert torch.equal(shifted["labels"], plain["labels"].repeat(2))
    for place in range(64):
        inside = place % 16 != 15
        expected = usual["loss_mask"][place + 1] if inside else torch.tensor(0.0)
        assert shifted["loss_mask"][place] == expected
    assert torch.equal(shifted["loss_mask"][64:], usual["loss_mask"][64:])
