"""FlexAttention's block mask, made from segments of positions, against the one that PyTorch makes pair by pair."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from nemodiff_train.attention import kernels
from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.attention.kernels import Kernel, select_kernel
from nemodiff_train.attention.plan import AttentionPlan, segmented_plan, uniform_plan
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.conversation import ConversationMaker
from nemodiff_train.objective.rule import can_attend
from tests import small

CPU = torch.device("cpu")


def conversations(draw: torch.Generator, length: int, block: int) -> Tensor:
    """[3, length] of a pack of conversations, whose answers are padded to whole blocks."""
    maker = ConversationMaker(objective=ObjectiveConfig(block_size=block), mask_token_id=5, length=length)
    turns = 2 * int(torch.randint(1, 5, (), generator=draw))
    lengths = torch.randint(1, max(2, length // 5), (turns,), generator=draw)
    opens = torch.rand(turns, generator=draw) < 0.4
    opens[0] = False
    pack = {
        "tokens": torch.randint(0, 40, (max(length, int(lengths.sum())),), generator=draw),
        "lengths": lengths,
        "answers": torch.arange(turns) % 2 == 1,
        "conversations": opens.cumsum(0),
    }
    return maker.clean(pack, block).segment_ids


@st.composite
def plans(draw: Any) -> AttentionPlan:
    """A plan of any kind."""
    size = draw(st.sampled_from([1, 1, 2, 4]))
    shard = ContextParallelShard(draw(st.integers(0, size - 1)), size)
    length = 2 * size * draw(st.integers(1, 240 // (2 * size)))
    block, views = draw(st.sampled_from([1, 4, 8, 12, 32])), draw(st.integers(0, 2))
    block_causal, causal_noise = draw(st.booleans()), draw(st.booleans())
    kind = draw(st.sampled_from(["regular", "text", "conversations"]))
    if kind == "regular":
        return uniform_plan(views, length, block, block_causal, shard, CPU, causal_noise)
    make, seed = {"text": small.documents, "conversations": conversations}[kind], draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    segment_ids = torch.stack([make(generator, length, block) for _ in range(draw(st.integers(1, 2)))])
    return segmented_plan(views, segment_ids, block_causal, block, shard, causal_noise)


TILES = [(16, 16), (32, 16), (64, 64), (128, 128)]


@settings(max_examples=80, deadline=None)
@given(plans(), st.sampled_from(TILES))
def test_tiles_are_those_of_the_pairs(plan: AttentionPlan, tile: tuple[int, int]) -> None:
    """No tile with an allowed pair is missing, full tiles are the same, and without documents all tiles are."""
    ours = plan.block_mask(tile)
    rule = plan.block_causal, plan.causal_noise
    allowed = can_attend(plan.queries.as_queries(), plan.keys.as_keys(), *rule)
    queries, keys = allowed.shape[-2:]
    rows = 1 if allowed.dim() == 2 else len(allowed)
    assert torch.equal(
        create_mask(ours.mask_mod, rows, 1, queries, keys, "cpu")[:, 0], allowed.view(rows, queries, keys)
    )
    theirs = create_block_mask(ours.mask_mod, rows, None, queries, keys, "cpu", BLOCK_SIZE=tile)
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("full_kv_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(table(ours.full_kv_num_blocks, ours.full_kv_indices),
                       table(theirs.full_kv_num_blocks, theirs.full_kv_indices))  # fmt: skip
    computed, needed = ours.to_dense().bool(), theirs.to_dense().bool()
    assert not (needed & ~computed).any()
    assert plan.keys.document.dim() > 1 or not (computed & ~needed).any()
    backward = table(ours.q_num_blocks, ours.q_indices) | table(ours.full_q_num_blocks, ours.full_q_indices)
    assert torch.equal(backward.mT, computed)


@pytest.mark.parametrize("make", [small.documents, conversations])
def test_few_tiles_are_computed_in_vain(make: Any) -> None:
    """Over forty samples of documents and turns about as long as a tile."""
    computed = needed = 0
    for seed in range(40):
        segment_ids = make(torch.Generator().manual_seed(seed), 256, 16)[None]
        plan = segmented_plan(1, segment_ids, False, 16, ContextParallelShard(), False)
        allowed = can_attend(plan.queries.as_queries(), plan.keys.as_keys(), False)
        computed += int(plan.block_mask((32, 32)).to_dense().sum())
        needed += int(allowed.view(16, 32, 16, 32).any(1).any(2).sum())
    assert needed <= computed <= 1.02 * needed


def table(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    """The table of tiles that a list of them describes."""
    assert counts is not None and indices is not None
    first = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter_(-1, indices.long(), first)


@pytest.mark.parametrize(
    ("kind", "shard"),
    [
        ("text", ContextParallelShard()),
        ("conversations", ContextParallelShard()),
        ("text", ContextParallelShard(1, 2)),
    ],
)
def test_flex_attention_is_sdpa(kind: str, shard: ContextParallelShard) -> None:
    """Two views of samples that differ, which end within a tile."""
    make = {"text": small.documents, "conversations": conversations}[kind]
    generator = torch.Generator().manual_seed(3)
    segment_ids = torch.stack([make(generator, 200, 16) for _ in range(2)])
    plan = segmented_plan(2, segment_ids, False, 16, shard, False)
    shapes = [(2, 4, len(plan.queries.view), 8), *[(2, 2, len(plan.keys.view), 8)] * 2]
    states = [torch.randn(shape, generator=generator) for shape in shapes]
    output = kernels.attend(*states, plan, 0.3, Kernel("flex", (128, 128)))
    torch.testing.assert_close(output, kernels.attend_sdpa(*states, plan, 0.3), rtol=1e-4, atol=1e-5)


def test_one_compilation_serves_all_samples() -> None:
    """In a process of its own, where no CPU stands in for CUDA, since compilation does not work with that."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        assert process.submit(graphs_of_samples).result() == 1


def graphs_of_samples() -> int:
    """Count the graphs compiled for samples of one shape with different segment ids; no kernel is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # conftest.py sets it where there is no GPU
    attend = torch.compile(flex_attention, backend="eager", dynamic=False, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(0)
    for number, make in enumerate((small.documents, small.documents, conversations)):
        plan = segmented_plan(1, make(generator, 128, 16)[None], False, 16, ContextParallelShard(), False)
        states = [torch.randn(1, heads, 256, 8, generator=generator) for heads in (4, 2, 2)]
        torch._dynamo.config.error_on_recompile = number > 0
        output = attend(*states, block_mask=plan.block_mask((64, 64)), enable_gqa=True)
        torch.testing.assert_close(output, kernels.attend_sdpa(*states, plan, None), rtol=1e-4, atol=1e-5)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_the_choice_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings overrule the rule, except where it has kernels of its own."""
    gpu, capability = torch.device("cuda"), {"of": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["of"])
    assert select_kernel(CPU, False, "flash", 64).name == select_kernel(gpu, True, "flash", 64).name == "sdpa"
    forced = {"FORCE_USE_FLEX_ATTENTION": True}
    assert select_kernel(gpu, False) == Kernel("flex", (128, 128), forced)
    assert select_kernel(gpu, False, tile=256, options={"num_warps": 8}) == Kernel(
        "flex", (256, 256), {**forced, "num_warps": 8}
    )
    assert select_kernel(gpu, False, "flash") == Kernel("flex", (128, 128), {"BACKEND": "FLASH"})
    capability["of"] = (10, 0)
    assert select_kernel(gpu, False) == Kernel("flex", (128, 128), forced)
    assert select_kernel(gpu, False, "flash") == Kernel("flex", (256, 128), {"BACKEND": "FLASH"})
    assert select_kernel(gpu, False, "flash", options={"BACKEND": "AUTO"}).options == {"BACKEND": "AUTO"}
