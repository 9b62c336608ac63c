"""``nemodiff plan``: its counts against the real model's, and its pages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemodiff_train.cli import main
from tests import small


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.qwen3(tmp_path / "model", num_hidden_layers=4)
    (tmp_path / "recipe.py").write_text("from tests.small import recipe\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*words: str) -> int:
    return main(["plan", "recipe.py", *words, "start_from=model", "data=data", "output=out"])


def test_layouts_best_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpus", "8", "--gpu", "h200", "--json", "plan.json", "train.global_batch_size=32") == 0
    assert "8 x h200" in capsys.readouterr().out
    found = json.loads(Path("plan.json").read_text())
    seconds = [sum(each["time"].values()) for each in found]
    assert seconds == sorted(seconds)
    shapes = [tuple(each["layout"][name] for name in ("tensor", "pipeline", "context", "data")) for each in found]
    assert {tensor * pipeline * context * data for tensor, pipeline, context, data in shapes} == {8}
    assert {shape[0] for shape in shapes} == {1, 2}  # two key-value heads
    assert {shape[1] for shape in shapes} >= {1, 2, 4}
    weights = [
        each["memory"]["weights"] for each in found if each["layout"]["tensor"] == 1 == each["layout"]["pipeline"]
    ]
    model = sum(tensor.numel() for tensor in small.weights(folder / "model").values())
    assert weights[0] == pytest.approx(4 * model, rel=0.002)  # norms of heads are left out


@pytest.mark.parametrize(
    ("recipe", "parameters"), [("ministral3_14b_joint", 13.5e9), ("qwen3_8b_joint", 8.2e9), ("qwen3_4b_ar", 4.0e9)]
)
def test_published_sizes_need_no_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    parameters: float,
) -> None:
    """What the whole run takes, by hand from the figures of one layout."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", recipe, "--gpus", "64", "--gpu", "h200", "--json", "plan.json"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    best = json.loads(Path("plan.json").read_text())[0]
    tokens = 1e12 if recipe.endswith("_ar") else 3e11
    assert best["days"] == pytest.approx(tokens / best["tokens_per_second"] / 86400, rel=1e-4)
    assert f"take {best['days']:,.1f} days: {best['days'] * 24 * 64:,.0f} GPU hours" in printed
    positions = 2 if recipe.endswith("_joint") else 1
    least = 6 * parameters * positions * best["tokens_per_second"] / (64 * 989e12)  # of the matrices alone
    assert least * 0.9 < best["mfu"] < least * 1.25


def test_step_times_are_near_those_that_others_have_published(tmp_path: Path) -> None:
    """A 14B model on 16 H200, 22,152 tokens/s at 64k and 9,301 at 256k (Turbo-dLLM, arXiv 2609.19242)."""
    from nemodiff_train.planning.hardware import GPUS
    from nemodiff_train.planning.layouts import Layout
    from nemodiff_train.planning.time import time_of

    for length, data, published in ((65_536, 8, 22_152), (262_144, 2, 9_301)):
        work = workload(
            layers=40, hidden=5120, query_channels=4096, key_channels=1024, feed_forward=16384, head_norms=False,
            vocabulary=131_072, tied=False, length=length, global_batch=data, mixed=True, sharded=True,
        )  # fmt: skip
        seconds = time_of(work, Layout(1, 1, 16 // data, data, 1, recompute=True), GPUS["h200"]).total
        assert 0.9 < data * length / seconds / published < 1.05


@pytest.mark.parametrize(
    ("gpus", "setting", "needle"),
    [
        ("7", "dataset.seq_length=64", "no layout on 7 GPUs"),
        ("0", "dataset.seq_length=64", "above 0"),
        ("8", "dataset.seq_length=50000000", "no layout on 8 x h100 fits"),
    ],
)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], gpus: str, setting: str, needle: str) -> None:
    assert plan("--gpus", gpus, setting) == 2
    assert needle in capsys.readouterr().err


def workload(**changes: Any) -> Any:
    from nemodiff_train.planning.workload import Workload

    sizes = dict(
        layers=2, hidden=256, query_channels=256, key_channels=128, feed_forward=768, gated=True, head_norms=True,
        vocabulary=4096, tied=True, length=512, views=1, block=32, micro_batch=1, global_batch=8, mixed=False,
        sharded=False,
    )  # fmt: skip
    return Workload(**{**sizes, **changes})


@pytest.mark.parametrize(("views", "length", "block"), [(0, 48, 16), (1, 48, 16), (2, 64, 8)])
def test_pairs_are_those_of_the_rule(views: int, length: int, block: int) -> None:
    from nemodiff_train.attention.context_parallel import ContextParallelShard
    from nemodiff_train.attention.plan import uniform_plan
    from nemodiff_train.objective.rule import can_attend

    places = uniform_plan(views, length, block, False, ContextParallelShard(), torch.device("cpu"), False)
    allowed = can_attend(places.queries.as_queries(), places.keys.as_keys(), False)
    assert workload(views=views, length=length, block=block).pairs == int(allowed.sum())


def test_operations_of_a_joint_step_are_nearly_the_minimum() -> None:
    """A joint step takes docs/performance.md's minimum, and at most 5% more."""
    from torch.utils.flop_counter import FlopCounterMode

    work = workload(
        layers=4, hidden=512, query_channels=512, key_channels=256, feed_forward=1536, vocabulary=8_192, length=512
    )
    sizes = dict(
        vocab_size=work.vocabulary, hidden_size=work.hidden, intermediate_size=work.feed_forward,
        num_hidden_layers=work.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = small.built(sizes)
    batch = small.batch(model, work.length)
    counter = FlopCounterMode(display=False, custom_mapping=_kernels_of_the_cpu())
    with counter:
        small.step(model, batch)
    places = len(batch["loss_indices"])
    minimum = work.matrix_flops + work.attention_flops + 6 * work.embedding_parameters * places
    print(f"counted / minimum: {counter.get_total_flops() / minimum:.4f}")
    assert 1.0 <= counter.get_total_flops() / minimum <= 1.05


def test_adapters_take_gradients_and_optimizer_state_alone() -> None:
    """The frozen weights are there, and nothing else of them."""
    from nemodiff_train.planning.layouts import Layout
    from nemodiff_train.planning.memory import memory_of

    layout, whole, drafter = Layout(1, 1, 1, 2, 4, False), workload(), workload(layer_adapters=5000, drafts=True)
    adapters = drafter.layers * 5000
    trains, drafts = memory_of(whole, layout), memory_of(drafter, layout)
    assert drafts.gradients == 4 * adapters and drafts.optimizer == 8 * adapters
    assert drafts.weights == trains.weights + 4 * adapters
    assert drafts.total < trains.total and drafter.matrix_flops < whole.matrix_flops
    tuned = memory_of(workload(layer_adapters=5000), layout)
    # The output layer's gradient is kept in fp32, and scaled into another.
    assert trains.logits - tuned.logits == whole.embedding_parameters * (4 + 4 + whole.bytes_per_element)


@pytest.mark.parametrize("layer_adapters", [0, 5000])
def test_a_path_selector_goes_backward_through_no_layer(layer_adapters: int) -> None:
    """Layers and output layer run forward alone: a third of the operations, two each per weight and position."""
    from nemodiff_train.planning.layouts import Layout
    from nemodiff_train.planning.memory import estimated_stage, memory_of

    whole = workload()
    trained = workload(layer_adapters=layer_adapters, drafts=True, selector_rank=16)
    adapters = trained.layers * layer_adapters
    assert trained.matrix_flops == whole.matrix_flops / 3 + 2 * adapters * trained.positions
    assert trained.attention_flops == whole.attention_flops / 3
    # Half of the positions are masked: 5 tokens before each, its state and 16 candidates meet matrices.
    own = 6 * (5 + 1 + 16) * 16 * trained.hidden * trained.length / 2
    assert trained.head_flops == whole.head_flops / 3 + own
    pipeline = Layout(1, 2, 1, 1, 4, False)
    first, last = (estimated_stage(trained, pipeline, index).trained for index in (0, 1))
    assert (first, last) == (0, 7 * 16 * trained.hidden)
    kept, keeps = (memory_of(work, Layout(1, 1, 1, 1, 4, False)).activations for work in (trained, whole))
    assert kept < keeps


@pytest.mark.parametrize("recompute", [True, False])
def test_what_a_layer_keeps_is_as_planned(recompute: bool) -> None:
    """Within 5%: what two more layers keep from the forward to the backward pass of a joint step."""
    from nemodiff_train.planning.layouts import Layout
    from nemodiff_train.planning.memory import _saved_by_layer

    sizes = {**small.sizes(128), "intermediate_size": 384, "head_dim": 32}
    kept = [_kept_by_a_step({**sizes, "num_hidden_layers": layers}, recompute) for layers in (4, 2)]
    heads, keys = sizes["num_attention_heads"] * 32, sizes["num_key_value_heads"] * 32
    work = workload(
        hidden=128,
        query_channels=heads,
        key_channels=keys,
        feed_forward=384,
        length=256,
        recompute_elementwise=recompute,
    )
    planned = _saved_by_layer(work, Layout(1, 1, 1, 1, 1, False), "cpu")
    assert (kept[0] - kept[1]) / 2 == pytest.approx(planned, rel=0.05)


def _kept_by_a_step(settings: dict[str, Any], recompute: bool) -> int:
    """Return the bytes that autograd holds after a forward pass, beside the parameters."""
    model = small.built(settings)
    model.config.recompute_elementwise = recompute
    held: dict[int, torch.UntypedStorage] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr() or id(tensor)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = small.loss(model, small.batch(model, 256))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert loss.requires_grad
    return sum(storage.nbytes() for address, storage in held.items() if address not in own)


def _kernels_of_the_cpu() -> dict[Any, Any]:
    """What FlopCounterMode does not know: the keys that a flash call visits, and a product added in place."""

    def visited(query: Any, key: Any, causal: bool) -> int:
        batch, heads, queries, width = query
        return batch * heads * width * (queries * (queries + 1) // 2 if causal else queries * key[2])

    def forward(
        query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any
    ) -> int:
        return 4 * visited(query, key, causal)

    def backward(
        gradient: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logs: Any,
        dropout: float,
        causal: bool,
        *_: Any,
        **__: Any,
    ) -> int:
        return 10 * visited(query, key, causal)  # five products: the scores are made again

    def added(total: Any, one: Any, other: Any, *_: Any, **__: Any) -> int:
        return int(2 * one[0] * one[1] * other[1])

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        aten.addmm_: added,
    }
