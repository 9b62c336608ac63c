"""What only a GPU runs: kernels against the rule, training against the CPU's, layouts of several GPUs, decoding.

Skipped where there is none.  ``NEMODIFF_REHEARSE=1`` runs it all on a CPU, with the CPU's kernels;
``tools/gpu_check`` uses both.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import jobs, small
from tests.conftest import GPU

pytestmark = pytest.mark.skipif(not (GPU or os.environ.get("NEMODIFF_REHEARSE")), reason="there is no GPU")

DEVICE = torch.device("cuda" if GPU else "cpu")
ROOT = Path(__file__).parents[1]
# Of the largest value: rounding of the inputs' type, summed over a few hundred products.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}


def segment_ids(rows: int, length: int) -> Tensor:
    """Return [rows, 3, length] segment ids of samples whose documents end anywhere."""
    draw = torch.Generator().manual_seed(0)
    return torch.stack([small.documents(draw, length, 32) for _ in range(rows)]).to(DEVICE)


def plan_of(kind: str, rows: int, length: int) -> Any:
    from nemodiff_train.attention.context_parallel import ContextParallelShard
    from nemodiff_train.attention.plan import segmented_plan, uniform_plan

    match kind:
        case "causal":
            return uniform_plan(0, length, 32, False, ContextParallelShard(), DEVICE, False)
        case "joint":
            return uniform_plan(1, length, 32, False, ContextParallelShard(), DEVICE, False)
        case "two views, block-causal":
            return uniform_plan(2, length, 16, True, ContextParallelShard(), DEVICE, False)
    return segmented_plan(1, segment_ids(rows, length), False, 32, ContextParallelShard(), False)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of all pairs in fp64."""
    return small.dense(query.double(), key.double(), value.double(), mask)


def heads(rows: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Random queries of 4 heads, keys and values of 2, all of width 64."""
    draw = torch.Generator().manual_seed(1)
    shapes = (rows, 4, queries, 64), (rows, 2, keys, 64), (rows, 2, keys, 64)
    return [torch.randn(shape, generator=draw).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("kind", ["causal", "joint", "two views, block-causal", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_follows_the_rule(kind: str, dtype: torch.dtype) -> None:
    """Forward and the gradients of queries, keys and values."""
    check_attention(kind, dtype)


@pytest.mark.parametrize("kind", ["joint", "two views, block-causal", "documents"])
def test_flash_attention_follows_the_rule(kind: str) -> None:
    """Where it can be asked for."""
    from nemodiff_train.attention.kernels import select_kernel
    from nemodiff_train.validation.kernels import attention_problems

    model = SimpleNamespace(attention_kernel="flash", attention_tile=0, context_parallel_size=1)
    if found := list(attention_problems(model, 512, GPU)):
        pytest.skip("; ".join(found))
    check_attention(kind, torch.bfloat16, select_kernel(DEVICE, False, "flash"))


def check_attention(kind: str, dtype: torch.dtype, kernel: Any = None) -> None:
    """Compare attention of two samples of 256 tokens with the rule."""
    from nemodiff_train.attention import kernels
    from nemodiff_train.objective.rule import can_attend

    rows = 2
    plan = plan_of(kind, rows, 256)
    mask = can_attend(plan.queries.as_queries(), plan.keys.as_keys(), plan.block_causal)
    states = heads(rows, len(plan.queries.view), len(plan.keys.view), dtype)
    upstream = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    found = kernels.attend(*states, plan, None, kernel or kernels.select_kernel(DEVICE, plan.causal))
    gradients = torch.autograd.grad(found, states, upstream)
    expected = dense(*states, mask if mask.dim() == 2 else mask.view(-1, 1, *mask.shape[-2:]))
    assert difference(found, expected) < TOLERANCE[dtype]
    for mine, other in zip(gradients, torch.autograd.grad(expected, states, upstream.double()), strict=True):
        assert difference(mine, other) < TOLERANCE[dtype]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_a_cache(masked: bool) -> None:
    from nemodiff_train.attention import kernels

    new, visible = 16, 80
    query, key, value = heads(2, new, visible, torch.float32)
    places = torch.arange(visible, device=DEVICE)
    mask = (places <= places[-new:, None]).expand(2, 1, -1, -1) if masked else None
    found = kernels.attend_cached(query, key, value, mask, False, None)
    everything = torch.ones(new, visible, dtype=torch.bool, device=DEVICE)
    assert (
        difference(found, dense(query, key, value, everything if mask is None else mask)) < TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_head_in_chunks(dtype: torch.dtype) -> None:
    """Losses and gradients at the positions that carry loss, over more than one chunk of them."""
    from megatron.core import parallel_state

    from nemodiff_train.model.head import token_losses
    from nemodiff_train.model.loading import start_model_parallel

    start_model_parallel(1)
    draw = torch.Generator().manual_seed(0)
    positions, hidden, vocabulary = 1500, 64, 1000
    states = torch.randn(positions, 1, hidden, generator=draw).to(DEVICE, dtype).requires_grad_()
    table = (torch.randn(vocabulary, hidden, generator=draw) / 8).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(vocabulary, (1, positions), generator=draw).to(DEVICE)
    weights = (torch.rand(1, positions, generator=draw) * (torch.rand(1, positions, generator=draw) < 0.6)).to(DEVICE)
    group = parallel_state.get_tensor_model_parallel_group()
    layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=table)
    places = weights.flatten().nonzero()[:, 0]
    found = token_losses(states, labels, places, weights, vocabulary, layer, table)
    gradients = torch.autograd.grad((found * weights).sum(), (states, table))
    logits = states.double()[:, 0] @ table.double().T
    expected = torch.nn.functional.cross_entropy(logits, labels[0], reduction="none") * (weights[0] > 0)
    assert difference(found[0], expected) < TOLERANCE[dtype]
    for mine, other in zip(
        gradients, torch.autograd.grad((expected * weights[0]).sum(), (states, table)), strict=True
    ):
        assert difference(mine, other) < TOLERANCE[dtype]


RECIPE = """
from nemodiff_train.model.adapters import lora
from tests import small


def recipe(start_from: str, data: str, output: str, precision: str = "", rank: int = 0) -> object:
    config = small.recipe(start_from, data, output)
    config.mixed_precision, config.checkpoint.save_interval = precision or None, 10
    config.peft = lora(rank)
    return config
"""

RANKS = min(torch.cuda.device_count(), 8) if GPU else 2
SHARDED = ["ddp.use_distributed_optimizer=true", "optimizer.use_distributed_optimizer=true",
           "ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true", "checkpoint.async_save=true",
           "checkpoint.async_strategy=mcore", "checkpoint.dist_ckpt_optim_fully_reshardable=true"]  # fmt: skip
TENSOR = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]
STAGES = ["model.pipeline_model_parallel_size=2"]
INTERLEAVED = [*STAGES, "model.virtual_pipeline_model_parallel_size=2"]
CONTEXT = ["model.context_parallel_size=2"]
FULL_RECOMPUTE = ["model.recompute_granularity=full", "model.recompute_method=uniform",
                  "model.recompute_num_layers=1"]  # fmt: skip
FIRST = TENSOR if RANKS < 4 else [*TENSOR, *STAGES]
SECOND = INTERLEAVED if RANKS < 4 else [*INTERLEAVED, *CONTEXT]
"""Layouts of a run until its fifth step and after it: four kinds of parallelism where there are four GPUs or more."""


class Wave:
    """Processes that run at the same time, since most of what each does is to import Megatron.

    Args:
        folder: Where they run, and leave ``NAME.log``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: dict[str, int] = {}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, ranks: int = 1, **environment: str) -> None:
        """Start a verb of ``nemodiff``."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (self.folder / f"{name}.log").open("w") as log:
            self._started[name] = subprocess.Popen(
                [sys.executable, *(launcher if ranks > 1 else []), "-m", "nemodiff_train", *words],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": path, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def train(self, name: str, *words: str, start_from: str = "model", ranks: int = 1, **environment: str) -> None:
        """Start ten steps of the recipe."""
        named = [f"start_from={start_from}", "data=data", f"output={name}"]
        self.start(name, "train", "recipe.py", *words, *named, ranks=ranks, **environment)

    def join(self) -> None:
        """Wait for all of them."""
        self.codes |= {name: process.wait(timeout=400) for name, process in self._started.items()}

    def check(self, name: str) -> str:
        """Return what a process has printed, after a look at its exit code."""
        printed = (self.folder / f"{name}.log").read_text()
        assert self.codes[name] == 0, f"{name}: exit code {self.codes[name]}\n{printed[-3000:]}"
        return printed

    def steps(self, name: str) -> list[dict[str, float]]:
        """Return the steps that a process has trained."""
        self.check(name)
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Wave:
    """Ten steps of a small model: on the CPU, here in fp32 with a checkpoint, and here in bf16."""
    wave = Wave(tmp_path_factory.mktemp("gpu"))
    small.qwen3(wave.folder / "model")
    small.data(wave.folder / "data")
    (wave.folder / "recipe.py").write_text(RECIPE)
    wave.train("cpu", CUDA_VISIBLE_DEVICES="")
    wave.train("fp32")
    wave.train("bf16", "precision=bf16_mixed")
    wave.join()
    return wave


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_training_is_the_cpus(trained: Wave, name: str, tolerance: float) -> None:
    """The same noise and, within the type's rounding, the same losses and gradient norms over ten steps."""
    same(trained.steps(name), trained.steps("cpu"), tolerance)


def same(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    """Compare two runs of ten steps."""
    assert len(found) == len(expected) == 10
    for mine, other in zip(found, expected, strict=True):
        assert mine["masked_fraction"] == pytest.approx(other["masked_fraction"], abs=1e-6)
        for figure in ("loss", "ar_loss", "diffusion_loss", "grad_norm"):
            assert mine[figure] == pytest.approx(other[figure], rel=tolerance), figure


def test_self_speculation_is_ar_decoding(trained: Wave) -> None:
    """Every mode decodes what was trained here, and the lossless ones say the same."""
    trained.check("fp32")
    found = jobs.decode(str(trained.folder / "fp32" / "checkpoints"))
    assert all(len(tokens) == 24 for tokens in found["diffusion"])
    assert found["linear"] == found["quadratic"] == found["oracle"] == found["ar"]


@pytest.fixture(scope="module")
def verbs(trained: Wave) -> Wave:
    """What else users do with a model and a checkpoint; on several GPUs also half of a run in parts."""
    wave = Wave(trained.folder)
    wave.start("import", "convert", "import", "model", "imported", "--mask-token", small.MASK)
    wave.train("lora", "rank=8", start_from="fp32/checkpoints")
    wave.train("fp8", "precision=bf16_with_fp8_current_scaling_mixed")
    if RANKS > 1:
        wave.train("parts", *FIRST, *SHARDED, "train.exit_interval=5", ranks=RANKS)
    wave.join()
    wave.start("verify", "convert", "verify", "imported", "model")
    wave.start("generate", "generate", "lora/checkpoints", "the", "--max-new-tokens", "8", "--mode", "linear")
    if RANKS > 1:
        words = ["--task", "task.jsonl", "--max-new-tokens", "8", "--output", "evaluated"]
        (wave.folder / "task.jsonl").write_text('{"prompt": "the", "answer": "0"}\n' * 4)
        wave.start("eval", "eval", "fp32/checkpoints", *words, "--tensor-parallel", "2", ranks=2)
    wave.join()
    if wave.codes.get("parts") == 0:
        wave.train("parts", *SECOND, *SHARDED, *FULL_RECOMPUTE, ranks=RANKS)
        wave.join()
    return wave


def test_an_imported_model_is_verified(verbs: Wave) -> None:
    """On the device of this machine, against Transformers on the CPU."""
    verbs.check("import")
    verbs.check("verify")


def test_adapters_are_trained_and_decoded(verbs: Wave) -> None:
    assert len(verbs.steps("lora")) == 10
    verbs.check("generate")


def test_fp8_trains_or_is_refused(verbs: Wave) -> None:
    """In one line."""
    printed = (verbs.folder / "fp8.log").read_text()
    assert verbs.codes["fp8"] == 0 or (verbs.codes["fp8"] == 2 and "fp8 needs" in printed), printed[-3000:]


@pytest.mark.skipif(RANKS < 2, reason="there is one GPU")
def test_layouts_train_the_same_model(trained: Wave, verbs: Wave) -> None:
    """A run in parts, with communication hidden and saves in the background, that changes its layout half way."""
    same(verbs.steps("parts"), trained.steps("fp32"), 1e-3)


@pytest.mark.skipif(RANKS < 2, reason="there is one GPU")
def test_evaluation_on_two_ranks(verbs: Wave) -> None:
    verbs.check("eval")
    assert (verbs.folder / "evaluated").is_dir()
