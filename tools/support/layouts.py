"""Layouts of ranks, each of which must be the same training as one rank.

``tests/test_layouts.py`` runs them in the suite; ``tools/layout_matrix`` prints them as a table.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.support import small
from tools.support.ranks import Jobs

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
AUTOMODEL = ["objective.reduction=automodel"]
HALF_WAY = 5
SETTINGS = ("checkpoint.save_interval=0", "train.micro_batch_size=4")
"""Overrides of every run."""


@dataclass(frozen=True)
class Layout:
    """A training run that must equal another one."""

    world_size: int
    settings: list[str]
    like: str = "one"
    """Name of the run that it must equal."""
    model: str = "qwen3"
    continues: str | None = None
    """Name of the run whose checkpoint after half of the steps it continues from."""
    plain: bool = False
    """With a dense mask and all logits at once in place of the project's kernels."""


REFERENCES = {
    "one": Layout(1, SAVED_HALF_WAY),
    "documents_one": Layout(1, DOCUMENTS),
    "views_one": Layout(1, VIEWS),
    "automodel_one": Layout(1, AUTOMODEL),
    "tied_one": Layout(1, [], model="tied"),
    "odd_one": Layout(1, [], model="odd"),
}
"""Runs on one rank: as they are, with documents, with two views, with the Automodel reduction, with tied embeddings,
and with an odd vocabulary."""

LAYOUTS = {
    "micro1": Layout(1, ["train.micro_batch_size=1"]),
    "micro2": Layout(1, ["train.micro_batch_size=2"]),
    "recompute": Layout(1, FULL_RECOMPUTE),
    "plain": Layout(1, ["model.recompute_elementwise=false"], plain=True),
    "dp2": Layout(2, []),
    "dp2_sharded": Layout(2, [*SHARDED, *SAVED_HALF_WAY, "checkpoint.dist_ckpt_optim_fully_reshardable=true"]),
    "dp2_sharded_overlap": Layout(2, [*SHARDED, *OVERLAP]),
    "tp2": Layout(2, TP2),
    "tp2_dp2_sharded": Layout(4, [*TP2, *SHARDED]),
    "sp2": Layout(2, SP2),
    "sp2_dp2_sharded_overlap": Layout(4, [*SP2, *SHARDED, *OVERLAP]),
    "sp2_pp2_vpp2": Layout(4, [*SP2, *VPP2]),
    "sp2_cp2": Layout(4, [*SP2, *CP2]),
    "pp2": Layout(2, PP2),
    "pp2_selective": Layout(2, [*PP2, *SELECTIVE_RECOMPUTE]),
    "pp2_uneven": Layout(2, [*PP2, "model.num_layers_in_first_pipeline_stage=1"]),
    "pp2_vpp2": Layout(2, VPP2),
    "pp2_vpp2_cp2": Layout(4, [*VPP2, *CP2]),
    "pp3_uneven": Layout(
        3,
        [
            "model.pipeline_model_parallel_size=3",
            "model.account_for_embedding_in_pipeline_split=true",
            "model.account_for_loss_in_pipeline_split=true",
        ],
    ),
    "cp2": Layout(2, CP2),
    "cp2_dp2_sharded": Layout(4, [*CP2, *SHARDED]),
    "cp4": Layout(4, ["model.context_parallel_size=4"]),
    "documents_micro1": Layout(1, [*DOCUMENTS, "train.micro_batch_size=1"], "documents_one"),
    "documents_micro2": Layout(1, [*DOCUMENTS, "train.micro_batch_size=2"], "documents_one"),
    "documents_dp2": Layout(2, DOCUMENTS, "documents_one"),
    "documents_sp2_cp2": Layout(4, [*DOCUMENTS, *SP2, *CP2], "documents_one"),
    "documents_pp2_vpp2_recompute": Layout(2, [*DOCUMENTS, *VPP2, *FULL_RECOMPUTE], "documents_one"),
    "documents_pp2_selective": Layout(2, [*DOCUMENTS, *PP2, *SELECTIVE_RECOMPUTE], "documents_one"),
    "views_sp2_cp2": Layout(4, [*VIEWS, *SP2, *CP2], "views_one"),
    "views_pp2": Layout(2, [*VIEWS, *PP2], "views_one"),
    "automodel_dp2": Layout(2, AUTOMODEL, "automodel_one"),
    "automodel_pp2_vpp2_cp2": Layout(4, [*AUTOMODEL, *VPP2, *CP2], "automodel_one"),
    "tied_pp2": Layout(2, PP2, "tied_one", "tied"),
    "tied_tp2_pp2": Layout(4, [*TP2, *PP2], "tied_one", "tied"),
    "odd_sp2_pp2": Layout(4, [*SP2, *PP2], "odd_one", "odd"),
    "one_then_tp2_pp2": Layout(4, [*TP2, *PP2], continues="one"),
    "one_then_cp2": Layout(2, CP2, continues="one"),
    "dp2_sharded_then_one": Layout(1, SHARDED, continues="dp2_sharded"),
    "dp2_sharded_then_pp2": Layout(2, [*PP2, *SHARDED], continues="dp2_sharded"),
}
"""Names join the sizes of tensor (tp; sp with sequence parallelism), pipeline (pp; vpp interleaved), context (cp) and
data parallelism (dp), after what else the run has."""


def prepare(folder: str | Path) -> None:
    """Write the models and the data that the runs start from."""
    folder = Path(folder)
    layers = {"num_hidden_layers": 4}  # one for each of two stages' two chunks
    small.qwen3(folder / "qwen3", **layers)
    small.qwen3(folder / "tied", tie_word_embeddings=True, **layers)
    small.qwen3(folder / "odd", vocab_size=small.VOCABULARY + 1, **layers)
    small.data(folder / "data")
    prompts = [{"prompt": "the quick"[: 2 + n], "answer": str(n)} for n in range(6)]
    (folder / "task.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def evaluated(folder: Path) -> tuple[str, ...]:
    """Return the settings of a run that decodes every five steps."""
    task = f"evaluation.task={folder / 'task.jsonl'}"
    return ("evaluation.interval=5", task, "evaluation.count=6", "evaluation.max_new_tokens=12")


def add(jobs: Jobs, name: str, layout: Layout) -> None:
    """Add the training run of a layout, which returns its steps, to jobs in a folder of :func:`prepare`."""
    folder = jobs.folder
    arguments: dict[str, Any] = {
        "start_from": str(folder / layout.model),
        "data": str(folder / "data"),
        "output": str(folder / name),
        "settings": [*SETTINGS, *layout.settings],
    }
    if layout.continues is None:
        jobs.add(name, layout.world_size, train_plainly if layout.plain else train, **arguments)
    else:
        arguments |= {"stopped": str(folder / layout.continues), "step": HALF_WAY}
        jobs.add(name, layout.world_size, resume, after=layout.continues, **arguments)


def train(output: str, settings: list[str], recipe: str = "recipe", **arguments: Any) -> dict[str, Any]:
    """Train a recipe of :mod:`tools.support.small` with overrides; return the steps in ``metrics.jsonl``."""
    from nemodiff_train.config.overrides import override
    from nemodiff_train.training.run import train as run

    config = getattr(small, recipe)(output=output, **arguments)
    run(override(config, dict(word.split("=", 1) for word in settings)))
    return {"steps": [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]}


def train_plainly(**arguments: Any) -> dict[str, Any]:
    """Train with attention as one product over all pairs under a dense mask, and all logits at once."""
    from nemodiff_train.attention import kernels
    from nemodiff_train.model import head
    from nemodiff_train.objective.rule import can_attend

    def attend(
        query: Any, key: Any, value: Any, plan: Any, scale: float | None = None, kernel: Any = None
    ) -> torch.Tensor:
        batch_sizes.append(len(query))
        rule = plan.block_causal, plan.causal_noise
        mask = can_attend(plan.queries.as_queries(), plan.keys.as_keys(), *rule)
        return small.dense(query, key, value, mask, scale)

    batch_sizes: list[int] = []
    kernels.attend, head.LOGIT_CHUNK = attend, {"cpu": 10**9, "cuda": 10**9}
    result = train(**arguments)
    assert batch_sizes, "attention did not pass through the dense product"
    return result


def resume(output: str, stopped: str, step: int, **arguments: Any) -> dict[str, Any]:
    """Continue the run in ``stopped`` from its checkpoint of a step, under any layout; return the further steps."""
    source, target = Path(stopped, "checkpoints"), Path(output, "checkpoints")
    iteration, tracker = f"iter_{step:07d}", target / "latest_checkpointed_iteration.txt"
    if os.environ["RANK"] == "0":
        shutil.copytree(source / iteration, target / iteration)
        shutil.copy(source / iteration / "train_state.pt", target / "latest_train_state.pt")
        tracker.write_text(str(step))
    while not tracker.exists():
        time.sleep(0.1)
    return train(output, **arguments)


def difference(layout: Layout, steps: Steps, expected: Steps) -> dict[str, float]:
    """Return the largest relative difference of each figure over the steps of a run."""
    expected = expected[HALF_WAY:] if layout.continues else expected
    assert [step["step"] for step in steps] == [step["step"] for step in expected]
    pairs = list(zip(steps, expected, strict=True))
    return {name: max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs) for name in FIGURES}
