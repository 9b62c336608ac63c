"""The layout matrix: every layout and objective that must be the same training as one process.

``tests/test_layouts.py`` runs it in the suite, ``tools/layout_matrix`` prints it as a table.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import small
from tests.gang import Job

FIGURES = ("loss", "ar loss", "diffusion loss", "masked share", "gradient norm")
TOLERANCE = 1e-5
"""fp32 sums in another order differ by about 1e-7 relative; ten steps amplify that less than tenfold."""

TP2 = ["model.tensor_model_parallel_size=2"]
PP2 = ["model.pipeline_model_parallel_size=2"]
CP2 = ["model.context_parallel_size=2"]
SHARDED = ["ddp.use_distributed_optimizer=true", "optimizer.use_distributed_optimizer=true"]
DOCUMENTS = [
    "dataset.reset_attention_mask=true",
    "dataset.reset_position_ids=true",
    "objective.block_schedule=random",
    "objective.block_sizes=[3,16]",
]
VIEWS = [
    "objective.views=2",
    "objective.complementary=true",
    "objective.noise_per=block",
    "objective.weighting=none",
    "objective.clean_half=block_causal",
    "objective.shift=true",
]


@dataclass(frozen=True)
class Layout:
    """One row of the matrix."""

    name: str
    world: int
    """Processes."""
    settings: list[str] = field(default_factory=list)
    like: str = "one process"
    """The row it must equal."""
    model: str = "qwen3"


REFERENCES = [
    Layout("one process", 1, ["checkpoint.save_interval=5"]),
    Layout("documents, one process", 1, DOCUMENTS),
    Layout("views, one process", 1, VIEWS),
]

LAYOUTS = [
    Layout("micro-batch 1", 1, ["train.micro_batch_size=1"]),
    Layout("micro-batch 8", 1, ["train.micro_batch_size=8"]),
    Layout("tensor 2", 2, TP2),
    Layout("pipeline 2", 2, PP2),
    Layout("data 2, sharded optimizer", 2, SHARDED),
    Layout("tensor 2 x pipeline 2", 4, [*TP2, *PP2]),
    Layout("context 2", 2, CP2),
    Layout("context 4", 4, ["model.context_parallel_size=4"]),
    Layout("tensor 2 x context 2", 4, [*TP2, *CP2]),
    Layout("pipeline 2 x context 2", 4, [*PP2, *CP2]),
    Layout("data 2 x context 2, sharded optimizer", 4, [*CP2, *SHARDED]),
    *(
        Layout(f"documents, {name}", world, [*DOCUMENTS, *settings], "documents, one process")
        for name, world, settings in [
            ("micro-batch 1", 1, ["train.micro_batch_size=1"]),
            ("data 2", 2, []),
            ("context 2", 2, CP2),
            ("pipeline 2, full recompute", 2, [*PP2, *small.RECOMPUTE]),
        ]
    ),
    *(
        Layout(f"views, {name}", world, [*VIEWS, *settings], "views, one process")
        for name, world, settings in [("tensor 2 x context 2", 4, [*TP2, *CP2]), ("pipeline 2", 2, PP2)]
    ),
]


def prepare(folder: Path) -> None:
    """Models and data that the rows start from."""
    small.qwen3(folder / "qwen3")
    small.data(folder / "data")


def job(layout: Layout, folder: Path) -> Job:
    """The training run of one row."""
    arguments: dict[str, Any] = {
        "start_from": str(folder / layout.model),
        "data": str(folder / "data"),
        "output": str(folder / layout.name),
        "settings": layout.settings,
    }
    return Job(layout.name, layout.world, "jobs:train", arguments)


def difference(found: list[dict[str, float]], expected: list[dict[str, float]]) -> dict[str, float]:
    """Largest relative difference of each figure over the steps of two runs."""
    assert [step["step"] for step in found] == [step["step"] for step in expected]
    return {
        name: max(
            abs(mine[name] - other[name]) / abs(other[name]) for mine, other in zip(found, expected, strict=True)
        )
        for name in FIGURES
        if name in expected[0]
    }
