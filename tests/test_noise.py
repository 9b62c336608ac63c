"""The noise: a pure function of its key, with the distribution that its weights undo."""

import itertools
import math

import numpy as np
import pytest

from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.noise import Key, Noise, draw_noise
from nemodiff_train.objective.schedule import alpha_at, block_size_at
from nemodiff_train.validation.objective import objective_problems

DRAWS = 100_000
SEQUENCES = 1000
"""Drawn at once: sequences of one sample have noise of their own."""
LENGTH, BLOCK = 16, 8
MASKABLE = np.array([position != 5 for position in range(LENGTH)])
BLOCKS = np.arange(LENGTH) // BLOCK
BATCH = 8

SCHEDULES: dict[str, dict[str, object]] = {
    "nemotron": {},
    "clipped": {"min_noise_level": 0.3, "max_noise_level": 0.8},
    "fully masked fraction": {"fully_masked_fraction": 0.25, "min_noise_level": 0.1},
    "per block": {"noise_granularity": "block", "min_noise_level": 0.1},
    "antithetic": {"noise_level_sampling": "antithetic", "min_noise_level": 0.1},
    "stratified": {"noise_level_sampling": "stratified", "noise_granularity": "block", "min_noise_level": 0.1},
    "exact count": {"mask_sampling": "exact", "min_noise_level": 0.1},
    "exact count per block": {"mask_sampling": "exact", "noise_granularity": "block", "min_noise_level": 0.1},
    "half-life": {
        "mask_sampling": "exact",
        "noise_granularity": "block",
        "position_bias_half_life": 0.1,
        "min_noise_level": 0.1,
    },
    "complementary": {"views": 2, "complementary": True, "min_noise_level": 0.1, "max_noise_level": 0.9},
}


def draw(index: int, objective: ObjectiveConfig, split: int = 0) -> Noise:
    return draw_noise(Key(objective.seed, split, index), MASKABLE, BLOCKS, objective, BLOCK, BATCH, None)


def draw_many(objective: ObjectiveConfig) -> Noise:
    """Draw noise for DRAWS rows of LENGTH positions, as views of packed sequences."""
    size = SEQUENCES * LENGTH
    maskable, position = np.tile(MASKABLE, SEQUENCES), np.arange(size)
    blocks, sequences = position // BLOCK, position // LENGTH
    samples = [
        draw_noise(Key(objective.seed, 0, index), maskable, blocks, objective, BLOCK, BATCH, sequences)
        for index in range(DRAWS // SEQUENCES // objective.views)
    ]
    return Noise(
        *(np.concatenate([part.reshape(-1, LENGTH) for part in parts]) for parts in zip(*samples, strict=True))
    )


def within(found: np.ndarray, expected: float) -> bool:
    """Whether the mean over draws (axis 0) is the expected one, to five standard errors."""
    error = found.std(0) / math.sqrt(len(found))
    return bool((np.abs(found.mean(0) - expected) <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_over_many_draws(name: str) -> None:
    """The masked fraction is the mean level, and the weight is the inverse of a position's inclusion probability.

    So E[weight] = 1 at every maskable position, but for the half-life, which prefers late positions by design:
    there it holds for the mean over each block, and the preference is tested below.
    """
    objective = ObjectiveConfig(**{"block_size": BLOCK, **SCHEDULES[name]})  # type: ignore[arg-type]
    assert not [*objective_problems(objective, LENGTH)]
    masked, weight, level = draw_many(objective)
    assert masked.shape == (DRAWS, LENGTH)
    assert not masked[:, ~MASKABLE].any() and not weight[:, ~MASKABLE].any()
    low, high = objective.min_noise_level, objective.max_noise_level
    full = objective.fully_masked_fraction
    assert within(masked[:, MASKABLE].mean(1), (1 - full) * (low + high) / 2 + full)
    assert level.min() >= low - 1e-6 and level.max() <= max(high, float(full > 0)) + 1e-6
    np.testing.assert_allclose(weight[masked], 1 / level[masked], rtol=1e-5)
    if objective.position_bias_half_life is None:
        assert within(weight[:, MASKABLE], 1)
    else:
        for block in (0, 1):
            assert within(weight[:, MASKABLE & (block == BLOCKS)].mean(1), 1)


@pytest.mark.parametrize("noise_granularity", ["sequence", "block"])
def test_effective_weights_add_up_to_the_places(noise_granularity: str) -> None:
    """The fraction that was in fact masked: the weights of a sample or block with any mask sum to its positions."""
    objective = ObjectiveConfig(weighting="effective", noise_granularity=noise_granularity)  # type: ignore[arg-type]
    for index in range(300):
        found = draw(index, objective)
        for scope in [BLOCKS == 0, BLOCKS == 1] if noise_granularity == "block" else [BLOCKS >= 0]:
            if found.masked[0, scope].any():
                assert found.weight[0, scope].sum() == pytest.approx((MASKABLE & scope).sum(), rel=1e-6)
    assert set(np.unique(draw(3, ObjectiveConfig(weighting="none")).weight)) == {0.0, 1.0}


def test_an_exact_count_is_exact() -> None:
    objective = ObjectiveConfig(mask_sampling="exact", min_noise_level=0.5, max_noise_level=0.5)
    counts = [int(draw(index, objective).masked.sum()) for index in range(2000)]  # 0.5 x 15 positions: 7 or 8
    assert set(counts) == {7, 8} and abs(np.mean(counts) - 7.5) < 5 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize("level", [0.25, 0.5, 0.75])
def test_half_life_draws_without_replacement(level: float) -> None:
    """Inclusion by position against an enumeration of all orders in which a block of 4 can be drawn.

    The weight of position i is exp(beta (1 - t) i), beta = ln 2 / (half-life x block) (Efficient-DLM, section 3.3).
    """
    position_bias_half_life, size, count = 0.1, 4, round(level * 4)
    objective = ObjectiveConfig(
        mask_sampling="exact",
        noise_granularity="block",
        position_bias_half_life=position_bias_half_life,
        min_noise_level=level,
        max_noise_level=level,
    )
    beta = math.log(2) / (position_bias_half_life * size)
    preference = [math.exp(beta * (1 - level) * position) for position in range(size)]
    expected = np.zeros(size)
    for order in itertools.permutations(range(size), count):
        probability, left = 1.0, sum(preference)
        for position in order:
            probability, left = probability * preference[position] / left, left - preference[position]
        expected[list(order)] += probability
    everywhere, blocks = np.ones(size * SEQUENCES, dtype=bool), np.arange(size * SEQUENCES) // size
    drawn = np.concatenate(
        [
            draw_noise(Key(1, 0, index), everywhere, blocks, objective, size, 1, None).masked.reshape(-1, size)
            for index in range(DRAWS // SEQUENCES)
        ]
    )
    assert (drawn.sum(1) == count).all()
    error = np.sqrt(expected * (1 - expected) / len(drawn))
    assert (np.abs(drawn.mean(0) - expected) < 5 * error + 1e-9).all()
    assert expected[-1] > 1.3 * expected[0]


def test_a_sample_of_one_sequence_is_drawn_as_packed_ones_are() -> None:
    for settings in SCHEDULES.values():
        objective = ObjectiveConfig(**settings)  # type: ignore[arg-type]
        one = draw_noise(Key(objective.seed, 0, 7), MASKABLE, BLOCKS, objective, BLOCK, BATCH, np.zeros_like(BLOCKS))
        assert all(np.array_equal(*parts) for parts in zip(one, draw(7, objective), strict=True))


def test_noise_is_a_function_of_its_key() -> None:
    for settings in SCHEDULES.values():
        objective = ObjectiveConfig(**settings)  # type: ignore[arg-type]
        first, again = (draw(7, objective) for _ in range(2))
        for one, other in zip(first, again, strict=True):
            assert np.array_equal(one, other)
    levels = {
        float(draw(index, ObjectiveConfig(seed=seed), split).level[0, 0])
        for seed, split, index in [(1, 0, 7), (2, 0, 7), (1, 1, 7), (1, 0, 8)]
    }
    assert len(levels) == 4


def test_antithetic_pairs_mirror_each_other() -> None:
    objective = ObjectiveConfig(
        noise_level_sampling="antithetic", noise_granularity="block", min_noise_level=0.2, max_noise_level=0.6
    )
    for index in range(0, 20, 2):
        first, second = draw(index, objective), draw(index + 1, objective)
        np.testing.assert_allclose(first.level + second.level, 0.8, rtol=1e-5)
        assert not np.array_equal(first.masked, second.masked)


@pytest.mark.parametrize(("noise_granularity", "per_sample"), [("sequence", 1), ("block", 2)])
def test_stratified_levels_cover_a_global_batch_evenly(noise_granularity: str, per_sample: int) -> None:
    """Every one of the batch's equal parts of the range holds exactly one level."""
    objective = ObjectiveConfig(noise_level_sampling="stratified", noise_granularity=noise_granularity)  # type: ignore[arg-type]
    low, high = objective.min_noise_level, objective.max_noise_level
    for step in range(5):
        levels = np.concatenate([draw(step * BATCH + i, objective).level[0, ::BLOCK] for i in range(BATCH)])
        levels = levels if per_sample == 2 else levels[::2]
        strata = ((levels - low) / (high - low) * BATCH * per_sample).astype(int)
        assert sorted(strata) == list(range(BATCH * per_sample))


@pytest.mark.parametrize("noise_granularity", ["sequence", "block"])
def test_shared_levels_are_one_per_global_batch(noise_granularity: str) -> None:
    objective = ObjectiveConfig(noise_level_sampling="shared", noise_granularity=noise_granularity)  # type: ignore[arg-type]
    batches = [[draw(step * BATCH + index, objective) for index in range(BATCH)] for step in range(1000)]
    levels = np.array([[noise.level for noise in batch] for batch in batches]).reshape(len(batches), -1)
    assert (levels == levels[:, :1]).all() and len(np.unique(levels)) == len(batches)
    assert within(levels[:, 0], 0.5) and within(levels[:, 0] ** 2, 1 / 3)
    assert not np.array_equal(batches[0][0].masked, batches[0][1].masked)


def test_block_schedules() -> None:
    objective = ObjectiveConfig(block_schedule="random", block_sizes=[2, 16])
    sizes = [block_size_at(objective, step) for step in range(3000)]
    assert set(sizes) == set(range(2, 17)) and sizes[:50] == [block_size_at(objective, step) for step in range(50)]
    assert abs(np.mean(sizes) - 9) < 5 * np.std(sizes) / math.sqrt(3000)
    curriculum = ObjectiveConfig(block_schedule="curriculum", block_sizes=[4, 32, 64], block_steps=10)
    assert [block_size_at(curriculum, step) for step in (0, 9, 10, 19, 20, 500)] == [4, 4, 32, 32, 64, 64]
    assert block_size_at(curriculum, None) == 32 and curriculum.largest_block == 64


def test_alpha_ramp() -> None:
    ramp = ObjectiveConfig(alpha=0.3, alpha_ramp_steps=9)
    assert [alpha_at(ramp, step) for step in (0, 4, 9, 100)] == pytest.approx([0.03, 0.15, 0.3, 0.3])
    assert alpha_at(ObjectiveConfig(), 0) == 0.3
