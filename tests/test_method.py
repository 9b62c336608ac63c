"""The method, stated a second time: rule, plans, kernels, sample, reduction."""

import pytest
import torch

from nemodiff_train.attention import kernels
from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.attention.kernels import Kernel
from nemodiff_train.attention.plan import AttentionPlan, segmented_plan, uniform_plan
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.loss import loss_weights, report
from nemodiff_train.objective.rule import can_attend
from nemodiff_train.objective.sample import SampleMaker
from tests import small

CPU = torch.device("cpu")

# (length, block): one block, blocks of one position, groups that end inside and at the end of the sequence.
SHAPES = [(16, 16), (8, 1), (96, 32), (256, 32), (320, 64), (256, 256)]


def brute_force(
    length: int,
    block: list[int],
    document: list[int],
    views: int = 1,
    block_causal: bool = False,
    causal_noise: bool = False,
) -> torch.Tensor:
    """The rule in plain words, position by position."""
    table = [[False] * (views + 1) * length for _ in range((views + 1) * length)]
    clean = views * length
    for q in range(length):
        for k in range(length):
            together = document[q] == document[k]
            for view in range(views):
                own = view * length
                # Noisy sees its own noisy block in its own view, or what of it is not later.
                table[own + q][own + k] = block[q] == block[k] and (k <= q or not causal_noise)
                table[own + q][clean + k] = together and block[k] < block[q]  # noisy sees earlier clean blocks
            up_to = block[k] <= block[q] if block_causal else k <= q
            table[clean + q][clean + k] = together and up_to  # clean never sees noisy
    return torch.tensor(table)


def grid(length: int, block: int, views: int = 1, block_causal: bool = False) -> torch.Tensor:
    return brute_force(length, [position // block for position in range(length)], [0] * length, views, block_causal)


def stated(length: int, block: int, views: int = 1, block_causal: bool = False) -> torch.Tensor:
    """The package's rule for one document, as such a table."""
    blocks = torch.arange(length) // block
    positions = small.sample_positions(views, blocks, torch.zeros_like(blocks))
    return can_attend(positions.as_queries(), positions.as_keys(), block_causal)


@pytest.mark.parametrize("block_causal", [False, True])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_the_rule_is_the_table(length: int, block: int, views: int, block_causal: bool) -> None:
    assert torch.equal(stated(length, block, views, block_causal), grid(length, block, views, block_causal))


def test_the_rule_is_the_reference_s() -> None:
    """Megatron Bridge's own example, whose mask is right."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from megatron.bridge.diffusion.common.dllm import compute_block_mask

    theirs = compute_block_mask(16, 128).mask_mod
    position = torch.arange(256)
    table = theirs(torch.zeros(()), torch.zeros(()), position[:, None], position[None, :])
    assert torch.equal(stated(128, 16), table)


def states(queries: int, keys: int, rows: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(rows, 4, queries, 8), (rows, 2, keys, 8), (rows, 2, keys, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def check_kernel(plan: AttentionPlan, table: torch.Tensor, scale: float | None = None) -> None:
    """Both kernels, forward, and SDPA's backward, against dense attention."""
    size = table.shape[-1]
    ours, theirs = states(size, size), states(size, size)
    out, expected = kernels.attend_sdpa(*ours, plan, scale), small.dense(*theirs, table, scale)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_the_kernel_is_dense_attention(length: int, block: int, scale: float | None) -> None:
    check_kernel(
        uniform_plan(1, length, block, False, ContextParallelShard(), CPU, False), grid(length, block), scale
    )


@pytest.mark.parametrize(("views", "block_causal"), [(1, True), (2, False), (3, True), (0, False)])
def test_the_kernel_with_views_and_a_block_causal_clean_half(views: int, block_causal: bool) -> None:
    check_kernel(
        uniform_plan(views, 160, 32, block_causal, ContextParallelShard(), CPU, False),
        grid(160, 32, views, block_causal),
    )


def documents(length: int, block: int, ends: list[int]) -> tuple[list[int], list[int]]:
    """Block and document of each position, by counting."""
    blocks, numbers = [], []
    block_number, document, inside = -1, 0, 0
    for position in range(length):
        if inside % block == 0:
            block_number += 1
        blocks.append(block_number)
        numbers.append(document)
        inside += 1
        if position in ends:
            document, inside = document + 1, 0
    return blocks, numbers


@pytest.mark.parametrize(("views", "block_causal"), [(1, False), (2, True), (0, False)])
def test_the_kernel_with_documents(views: int, block_causal: bool) -> None:
    rows = [documents(300, 16, [5, 6, 150, 299]), documents(300, 16, [127])]
    segment_ids = torch.tensor([[numbers, blocks, [0] * 300] for blocks, numbers in rows])
    table = torch.stack([brute_force(300, *row, views, block_causal) for row in rows])[:, None]
    check_kernel(segmented_plan(views, segment_ids, block_causal, 16, ContextParallelShard(), False), table)


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("causal_noise", [False, True])
def test_the_gpu_kernel_follows_the_rule(irregular: bool, causal_noise: bool) -> None:
    rows = [documents(128, 32, [40]), documents(128, 32, [])]
    segment_ids = torch.tensor([[numbers, blocks, [0] * 128] for blocks, numbers in rows])
    plan = uniform_plan(1, 128, 32, False, ContextParallelShard(), CPU, causal_noise)
    if irregular:
        plan = segmented_plan(1, segment_ids, False, 32, ContextParallelShard(), causal_noise)
    rows = rows if irregular else [documents(128, 32, [])] * 2
    table = torch.stack([brute_force(128, *row, causal_noise=causal_noise) for row in rows])[:, None]
    q, k, v = (s.detach().float() for s in states(256, 256))
    found = kernels.attend(q, k, v, plan, None, Kernel("flex"))
    torch.testing.assert_close(found, small.dense(q, k, v, table), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize(
    ("size", "views", "block_causal", "causal_noise"),
    [(2, 1, False, False), (4, 2, False, False), (2, 1, True, False), (2, 0, False, False), (2, 1, False, True)],
)
def test_a_context_parallel_rank_computes_its_part(
    size: int, views: int, block_causal: bool, causal_noise: bool, irregular: bool
) -> None:
    """Every rank's plan in turn, given what the exchange would bring it; blocks reach across chunks."""
    length, block = 96, 9 if irregular else 12
    blocks, numbers = documents(length, block, [20, 50] if irregular else [])
    table = brute_force(length, blocks, numbers, views, block_causal, causal_noise)
    q, k, v = (s.detach()[:1] for s in states((views + 1) * length, (views + 1) * length))
    expected = small.dense(q, k, v, table)
    segment_ids = torch.tensor([[numbers, blocks, [0] * length]])
    shares = [ContextParallelShard(rank, size) for rank in range(size)]
    plans = [
        segmented_plan(views, segment_ids, block_causal, block, shard, causal_noise)
        if irregular
        else uniform_plan(views, length, block, block_causal, shard, CPU, causal_noise)
        for shard in shares
    ]
    own = [torch.cat([s * length + shard.positions(length) for s in range(views + 1)]) for shard in shares]
    assert sorted(torch.cat(own).tolist()) == list(range((views + 1) * length))
    for shard, plan, mine in zip(shares, plans, own, strict=True):
        layouts = [each.layout for each in plans]
        sent = [
            torch.cat([x[:, :, o][:, :, at.sent] for o, at in zip(own, layouts, strict=True)], dim=2) for x in (k, v)
        ]
        noisy = views * len(shard.positions(length))
        keys, values = (
            torch.cat([x[:, :, mine[:noisy]], everyone[:, :, plan.layout.received]], dim=2)
            for x, everyone in zip((k, v), sent, strict=True)
        )
        out = kernels.attend_sdpa(q[:, :, mine], keys, values, plan, None)
        torch.testing.assert_close(out, expected[:, :, mine], rtol=1e-9, atol=1e-9)
        if not irregular and length // (2 * size) % block == 0:
            assert len(plan.layout.sent) == length // size  # nothing but clean positions


def sample(length: int = 64, ends: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    text = torch.arange(20, 21 + length)
    text[list(ends)] = 2
    counts = torch.ones(length)
    counts[3] = 0
    return {"tokens": text[:-1], "labels": text[1:], "loss_mask": counts, "position_ids": torch.arange(length)}


def make(objective: ObjectiveConfig, index: int = 2, ends: tuple[int, ...] = (), **options: object) -> dict:
    return SampleMaker(objective=objective, mask_token_id=5, **options).make(sample(ends=ends), 0, index)


def test_the_sample() -> None:
    plain, made = sample(), make(ObjectiveConfig())
    masked = made["tokens"][:64] == 5
    assert 0 < masked.sum() < 64 and not masked[3]
    assert torch.equal(made["tokens"][:64][~masked], plain["tokens"][~masked])
    assert torch.equal(made["tokens"][64:], plain["tokens"])
    assert torch.equal(made["labels"], torch.cat([plain["tokens"], plain["labels"]]))
    assert torch.equal(made["loss_mask"][:64] > 0, masked)
    assert torch.equal(made["loss_mask"][64:], plain["loss_mask"])
    assert torch.equal(made["position_ids"], torch.arange(64).repeat(2))
    assert torch.equal(made["segment_ids"], torch.stack([torch.zeros(64), torch.arange(64) // 32, torch.arange(64)]))
    assert torch.equal(made["index_in_block"], torch.arange(64) % 32)
    torch.testing.assert_close(made["loss_mask"][:64][masked], 1 / made["noise_level"][masked])


def test_the_sample_with_views_of_complementary_noise() -> None:
    made = make(ObjectiveConfig(views=2, complementary=True, weighting="none"))
    first, second = (made["tokens"][:128] == 5).view(2, 64)
    maskable = sample()["loss_mask"] > 0
    assert torch.equal(first ^ second, maskable) and first.any() and second.any()
    torch.testing.assert_close(made["noise_level"][:64], 1 - made["noise_level"][64:])
    assert torch.equal(made["labels"], torch.cat([*[sample()["tokens"]] * 2, sample()["labels"]]))
    assert len(made["position_ids"]) == 192


def test_the_sample_with_documents() -> None:
    """Blocks and positions restart; the last token of a document has no AR target, but noise like any other."""
    ends = (9, 40, 63)
    made = make(ObjectiveConfig(block_size=16), ends=ends, eod_token_id=2, restart_positions=True)
    blocks, numbers = documents(64, 16, list(ends))
    positions = [position - max([end + 1 for end in ends if end < position], default=0) for position in range(64)]
    assert made["segment_ids"].tolist() == [numbers, blocks, positions]
    assert made["position_ids"].tolist() == positions * 2
    expected = sample()["loss_mask"].clone()
    expected[list(ends)] = 0
    assert torch.equal(made["loss_mask"][64:], expected)
    assert made["maskable"].tolist() == [position != 3 for position in range(64)]
    seen = torch.stack(
        [make(ObjectiveConfig(), i, ends, eod_token_id=2)["tokens"][list(ends)] == 5 for i in range(40)]
    )
    assert seen.any(0).all()
    together = make(ObjectiveConfig(block_size=16), ends=ends)
    assert together["segment_ids"][0].max() == 0 and together["loss_mask"][64 + 9] == 1


def test_the_shifted_sample() -> None:
    """Place i predicts token i + 1 where that is masked and in the same block."""
    plain = sample()
    shifted, usual = make(ObjectiveConfig(block_size=16, shift=True)), make(ObjectiveConfig(block_size=16))
    assert torch.equal(shifted["tokens"], usual["tokens"])
    assert torch.equal(shifted["labels"], plain["labels"].repeat(2))
    for position in range(64):
        inside = position % 16 != 15
        expected = usual["loss_mask"][position + 1] if inside else torch.tensor(0.0)
        assert shifted["loss_mask"][position] == expected
        if inside:
            assert shifted["noise_level"][position] == usual["noise_level"][position + 1]
            assert shifted["index_in_block"][position] == usual["index_in_block"][position + 1]
    assert torch.equal(shifted["loss_mask"][64:], usual["loss_mask"][64:])


def test_a_block_causal_clean_half_has_ar_targets_only_where_it_cannot_see_them() -> None:
    made = make(ObjectiveConfig(block_size=16, shift=True, clean_attention="block_causal"))
    assert made["loss_mask"][64:].nonzero()[:, 0].tolist() == [15, 31, 47, 63]


def batch_of(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in samples]) for name in samples[0]}


def parts_of(
    losses: torch.Tensor, batch: dict[str, torch.Tensor], objective: ObjectiveConfig, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, the denominator and the report of a micro-batch, at alpha = 0.3."""
    weights, denominator = loss_weights(batch, objective, 0.3, scale)
    loss = (losses * weights).sum()
    return loss, denominator, report(losses, batch, loss, denominator, objective)


def test_reduction_by_hand_and_over_any_micro_batching() -> None:
    objective = ObjectiveConfig()
    samples = [make(objective, n) for n in range(8)]
    batch, losses = batch_of(samples), torch.rand(8, 128, dtype=torch.float64)
    masks = batch["loss_mask"]
    ar = sum(float(losses[n, 64 + i] * masks[n, 64 + i]) for n in range(8) for i in range(64))
    diffusion = sum(float(losses[n, i] * masks[n, i]) for n in range(8) for i in range(64))
    total, count, whole = parts_of(losses, batch, objective)
    assert total.item() == pytest.approx(ar + 0.3 * diffusion, rel=1e-7) and count.item() == 8 * 63
    assert whole["ar_loss"].tolist() == pytest.approx([ar, 8 * 63], rel=1e-6)
    assert whole["diffusion_loss"].tolist() == pytest.approx([diffusion, 8 * 63], rel=1e-6)
    for size in (1, 2, 4):
        parts = [
            parts_of(losses[n : n + size], batch_of(samples[n : n + size]), objective)[2] for n in range(0, 8, size)
        ]
        for name, expected in whole.items():
            torch.testing.assert_close(sum(part[name] for part in parts), expected, rtol=1e-5, atol=1e-5)


def test_named_reductions() -> None:
    """Megatron Bridge divides each micro-batch by masked + all tokens; NeMo AutoModel each loss by its own."""
    batches = [batch_of([make(ObjectiveConfig(), n)]) for n in range(4)]
    losses = [torch.rand(1, 128, dtype=torch.float64) for _ in range(4)]
    ar = [float((some * batch["loss_mask"])[:, 64:].sum()) for some, batch in zip(losses, batches, strict=True)]
    noisy = [float((some * batch["loss_mask"])[:, :64].sum()) for some, batch in zip(losses, batches, strict=True)]
    masked = [int((batch["loss_mask"][:, :64] > 0).sum()) for batch in batches]

    def mean(name: str, scale: float = 1.0) -> float:
        objective = ObjectiveConfig(reduction=name)  # type: ignore[arg-type]
        parts = [parts_of(some, batch, objective, scale) for some, batch in zip(losses, batches, strict=True)]
        return float(sum(loss for loss, _, _ in parts) / sum(count for _, count, _ in parts))

    by_micro_batch = [(a + 0.3 * d) / (m + 63) for a, d, m in zip(ar, noisy, masked, strict=True)]
    assert mean("bridge") == pytest.approx(sum(by_micro_batch) / 4, rel=1e-6)
    expected = sum(ar) / (4 * 63) + 0.3 * sum(noisy) / sum(masked)
    assert mean("automodel", 4 * 63 / sum(masked)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["global", "automodel", "bridge"])
@pytest.mark.parametrize("views", [1, 2])
def test_weights_are_the_gradient_of_the_formula(reduction: str, views: int) -> None:
    """Bit for bit what autograd finds for the sums, divided and weighed as each reduction states."""
    objective = ObjectiveConfig(reduction=reduction, views=views, ar_weight=0.7)  # type: ignore[arg-type]
    batch = batch_of([make(objective, n) for n in range(3)])
    losses, scale = torch.rand(batch["loss_mask"].shape, requires_grad=True), torch.tensor(1.7)
    masks = batch["loss_mask"]
    ar, diffusion = (losses * masks)[:, -64:].sum(), (losses * masks)[:, :-64].sum() / views
    total = 0.7 * ar + diffusion * (0.3 * scale if reduction == "automodel" else 0.3)
    if reduction == "bridge":
        total = total / ((masks[:, :-64] > 0).sum() / views + batch["maskable"].sum())
    weights, _ = loss_weights(batch, objective, 0.3, scale)
    assert torch.equal(weights, torch.autograd.grad(total, losses)[0])
