"""The layout matrix: every layout and objective that must be the same training as one process.

``tests/test_layouts.py`` runs it in the suite, ``tools/layout_matrix`` prints it as a table.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import small
from tests.gang import Job

Steps = list[dict[str, float]]

FIGURES = ("loss", "ar_loss", "diffusion_loss", "masked_fraction", "grad_norm")
TOLERANCE = 1e-5
"""fp32 sums in another order differ by about 1e-7 relative; ten steps amplify that less than tenfold."""

TP2 = ["model.tensor_model_parallel_size=2"]
SP2 = [*TP2, "model.sequence_parallel=true"]
PP2 = ["model.pipeline_model_parallel_size=2"]
VPP2 = [*PP2, "model.virtual_pipeline_model_parallel_size=2"]
CP2 = ["model.context_parallel_size=2"]
SHARDED = ["ddp.use_distributed_optimizer=true", "optimizer.use_distributed_optimizer=true"]
FULL_RECOMPUTE = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]
SELECTIVE_RECOMPUTE = ["model.recompute_granularity=selective"]
OVERLAP = ["ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true", "ddp.bucket_size=20000"]
"""Buckets of a few matrices each, so that there are several."""
SAVED_HALF_WAY = ["checkpoint.save_interval=5"]
DOCUMENTS = [
    "dataset.reset_attention_mask=true",
    "dataset.reset_position_ids=true",
    "dataset.eod_mask_loss=true",
    "objective.alpha_ramp_steps=4",
    "objective.block_schedule=random",
    "objective.block_sizes=[3,16]",
]
VIEWS = [
    "objective.views=2",
    "objective.complementary=true",
    "objective.noise_granularity=block",
    "objective.noise_level_sampling=stratified",
    "objective.weighting=none",
    "objective.clean_attention=block_causal",
    "objective.shift=true",
    "objective.mask_embedding_noise=1",
]
HALF_WAY = 5


@dataclass(frozen=True)
class Layout:
    """One row of the matrix."""

    name: str
    world: int
    """Processes."""
    settings: list[str]
    like: str = "one process"
    """The row it must equal."""
    model: str = "qwen3"
    continues: str | None = None
    """The row whose checkpoint after half of the steps it continues from."""
    plain: bool = False
    """With a dense mask and all logits at once in place of the project's kernels."""


REFERENCES = [
    Layout("one process", 1, SAVED_HALF_WAY),
    Layout("documents, one process", 1, DOCUMENTS),
    Layout("views, one process", 1, VIEWS),
    Layout("automodel reduction, one process", 1, ["objective.reduction=automodel"]),
    Layout("tied embeddings, one process", 1, [], model="tied"),
    Layout("odd vocabulary, one process", 1, [], model="odd"),
]

LAYOUTS = [
    Layout("micro-batch 1", 1, ["train.micro_batch_size=1"]),
    Layout("micro-batch 2", 1, ["train.micro_batch_size=2"]),
    Layout("full recompute", 1, FULL_RECOMPUTE),
    Layout("no optimisation", 1, ["model.recompute_elementwise=false"], plain=True),
    Layout("data 2", 2, []),
    Layout("data 2, sharded optimizer, overlap", 2, [*SHARDED, *OVERLAP]),
    Layout("tensor 2 + sequence x data 2, sharded optimizer, overlap", 4, [*SP2, *SHARDED, *OVERLAP]),
    Layout(
        "data 2, sharded optimizer",
        2,
        [*SHARDED, *SAVED_HALF_WAY, "checkpoint.dist_ckpt_optim_fully_reshardable=true"],
    ),
    Layout("tensor 2", 2, TP2),
    Layout("tensor 2 + sequence", 2, SP2),
    Layout("pipeline 2", 2, PP2),
    Layout("pipeline 2, selective recompute", 2, [*PP2, *SELECTIVE_RECOMPUTE]),
    Layout("pipeline 2 x virtual 2", 2, VPP2),
    Layout("pipeline 2, uneven: 1 layer and 3", 2, [*PP2, "model.num_layers_in_first_pipeline_stage=1"]),
    Layout(
        "pipeline 3, uneven: embedding and loss counted",
        3,
        [
            "model.pipeline_model_parallel_size=3",
            "model.account_for_embedding_in_pipeline_split=true",
            "model.account_for_loss_in_pipeline_split=true",
        ],
    ),
    Layout("context 2", 2, CP2),
    Layout("context 4", 4, ["model.context_parallel_size=4"]),
    Layout("tensor 2 + sequence x pipeline 2 x virtual 2", 4, [*SP2, *VPP2]),
    Layout("tensor 2 + sequence x context 2", 4, [*SP2, *CP2]),
    Layout("tensor 2 x data 2, sharded optimizer", 4, [*TP2, *SHARDED]),
    Layout("pipeline 2 x virtual 2 x context 2", 4, [*VPP2, *CP2]),
    Layout("context 2 x data 2, sharded optimizer", 4, [*CP2, *SHARDED]),
    *(
        Layout(f"documents, {name}", world, [*DOCUMENTS, *settings], "documents, one process")
        for name, world, settings in [
            ("micro-batch 1", 1, ["train.micro_batch_size=1"]),
            ("micro-batch 2", 1, ["train.micro_batch_size=2"]),
            ("data 2", 2, []),
            ("tensor 2 + sequence x context 2", 4, [*SP2, *CP2]),
            ("pipeline 2 x virtual 2, full recompute", 2, [*VPP2, *FULL_RECOMPUTE]),
            ("pipeline 2, selective recompute", 2, [*PP2, *SELECTIVE_RECOMPUTE]),
        ]
    ),
    *(
        Layout(f"views, {name}", world, [*VIEWS, *settings], "views, one process")
        for name, world, settings in [("tensor 2 + sequence x context 2", 4, [*SP2, *CP2]), ("pipeline 2", 2, PP2)]
    ),
    *(
        Layout(f"automodel reduction, {name}", world, ["objective.reduction=automodel", *settings], like)
        for like in ["automodel reduction, one process"]
        for name, world, settings in [("data 2", 2, []), ("pipeline 2 x virtual 2 x context 2", 4, [*VPP2, *CP2])]
    ),
    *(
        Layout(f"tied embeddings, {name}", world, settings, "tied embeddings, one process", "tied")
        for name, world, settings in [("pipeline 2", 2, PP2), ("tensor 2 x pipeline 2", 4, [*TP2, *PP2])]
    ),
    Layout(
        "odd vocabulary, tensor 2 + sequence x pipeline 2",
        4,
        [*SP2, *PP2],
        "odd vocabulary, one process",
        "odd",
    ),
    Layout("one process, then tensor 2 x pipeline 2", 4, [*TP2, *PP2], continues="one process"),
    Layout("one process, then context 2", 2, CP2, continues="one process"),
    Layout("data 2, sharded optimizer, then one process", 1, SHARDED, continues="data 2, sharded optimizer"),
    Layout("data 2, sharded optimizer, then pipeline 2", 2, [*PP2, *SHARDED], continues="data 2, sharded optimizer"),
]


def prepare(folder: Path) -> None:
    """Models and data that the rows start from."""
    small.qwen3(folder / "qwen3")
    small.qwen3(folder / "tied", tie_word_embeddings=True)
    small.qwen3(folder / "odd", vocab_size=small.VOCABULARY + 1)
    small.data(folder / "data")
    prompts = [{"prompt": "the quick"[: 2 + n], "answer": str(n)} for n in range(6)]
    (folder / "task.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def evaluated(folder: Path) -> tuple[str, ...]:
    """Settings of a run that decodes every five steps."""
    task = f"evaluation.task={folder / 'task.jsonl'}"
    return ("evaluation.interval=5", task, "evaluation.count=6", "evaluation.max_new_tokens=12")


def job(layout: Layout, folder: Path) -> Job:
    """The training run of one row."""
    arguments: dict[str, Any] = {
        "start_from": str(folder / layout.model),
        "data": str(folder / "data"),
        "output": str(folder / layout.name),
        "settings": ["checkpoint.save_interval=0", "train.micro_batch_size=4", *layout.settings],
    }
    if layout.continues is None:
        function = "train_plainly" if layout.plain else "train"
        return Job(layout.name, layout.world, f"jobs:{function}", arguments)
    stopped = {"stopped": str(folder / layout.continues), "at": HALF_WAY}
    return Job(layout.name, layout.world, "jobs:resume", {**arguments, **stopped})


def difference(layout: Layout, found: Steps, expected: Steps) -> dict[str, float]:
    """Largest relative difference of each figure over the steps that a run took."""
    expected = expected[HALF_WAY:] if layout.continues else expected
    assert [step["step"] for step in found] == [step["step"] for step in expected]
    return {
        name: max(
            abs(mine[name] - other[name]) / abs(other[name]) for mine, other in zip(found, expected, strict=True)
        )
        for name in FIGURES
    }
