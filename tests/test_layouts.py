"""Every layout trains the same model; a stopped run continues exactly.  One gang runs it all."""

from pathlib import Path
from typing import Any

import pytest

from tests import gang, small
from tests.gang import Job

TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
SHARDED = ["ddp.use_distributed_optimizer=true", "optimizer.use_distributed_optimizer=true"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tensor 2": (2, [TP2]),
    "pipeline 2": (2, [PP2]),
    "data 2, sharded optimizer": (2, SHARDED),
    "tensor 2 x pipeline 2": (4, [TP2, PP2]),
    "micro-batch 1": (1, ["train.micro_batch_size=1"]),
    "micro-batch 8": (1, ["train.micro_batch_size=8"]),
}


def _plan(folder: Path) -> list[Job]:
    shared = {"start_from": str(folder / "qwen3"), "data": str(folder / "data")}

    def train(name: str, world: int, settings: list[str], **more: Any) -> Job:
        return Job(name, world, "jobs:train", {**shared, "output": str(folder / name), "settings": settings, **more})

    one = str(folder / "one process")
    stopped = {"output": str(folder / "resumed"), "stopped": one, "at": 5, "settings": ["checkpoint.save_interval=5"]}
    jobs = [
        train("one process", 1, ["checkpoint.save_interval=5"]),
        Job("resumed", 1, "jobs:resume", {**shared, **stopped}),
        *(train(name, world, settings) for name, (world, settings) in LAYOUTS.items()),
        train("ar stage", 1, ["train.train_iters=2"], stage="ar"),
        Job("loggers", 1, "jobs:loggers", {**shared, "output": str(folder / "loggers")}),
    ]
    for family in ("qwen3", "ministral3"):
        for tensor, pipeline in ((1, 1), (2, 1), (1, 2)):
            arguments = {"source": str(folder / family), "tensor": tensor, "pipeline": pipeline}
            jobs.append(Job(f"logits {family} {tensor} {pipeline}", tensor * pipeline, "jobs:ar_logits", arguments))
    for tensor in (1, 2):
        arguments = {"checkpoint": f"{one}/checkpoints", "tensor": tensor}
        jobs.append(Job(f"decode {tensor}", tensor, "jobs:decode", arguments))
    return jobs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gang")
    small.qwen3(folder / "qwen3")
    small.ministral3(folder / "ministral3")
    small.data(folder / "data")
    return gang.run(_plan(folder), folder)


def steps(results: dict[str, Any], name: str) -> list[dict[str, float]]:
    assert "error" not in results[name], results[name]["error"]
    found: list[dict[str, float]] = results[name]["steps"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_the_same_training(results: dict[str, Any], layout: str) -> None:
    """fp32 sums in another order differ by about 1e-7 relative; ten steps amplify that less than tenfold."""
    expected, found = steps(results, "one process"), steps(results, layout)
    assert [step["step"] for step in found] == list(range(1, 11))
    for mine, reference in zip(found, expected, strict=True):
        for name in ("loss", "ar loss", "diffusion loss", "masked share", "gradient norm"):
            assert mine[name] == pytest.approx(reference[name], rel=1e-5), (layout, name, mine["step"])
    assert expected[0]["diffusion loss"] != expected[1]["diffusion loss"]  # the noise moves from step to step


def test_a_resumed_run_continues_bit_for_bit(results: dict[str, Any]) -> None:
    expected, found = steps(results, "one process")[5:], steps(results, "resumed")
    assert [step["step"] for step in found] == [6, 7, 8, 9, 10]
    for mine, reference in zip(found, expected, strict=True):
        for name in ("loss", "ar loss", "diffusion loss", "masked share", "gradient norm"):
            assert mine[name] == reference[name]


def test_the_ar_stage_has_no_diffusion(results: dict[str, Any]) -> None:
    first = steps(results, "ar stage")[0]
    assert "diffusion loss" not in first and "masked share" not in first
    # The clean half of the joint stage is the AR model's view of the same samples.
    assert first["ar loss"] == pytest.approx(steps(results, "one process")[0]["ar loss"], rel=1e-5)


@pytest.mark.parametrize("layout", ["1 1", "2 1", "1 2"])
@pytest.mark.parametrize("family", ["qwen3", "ministral3"])
def test_imported_logits_are_transformers(results: dict[str, Any], family: str, layout: str) -> None:
    found = results[f"logits {family} {layout}"]
    assert "error" not in found, found["error"]
    assert found["difference"] < 1e-4
    if family == "ministral3":
        assert found["without_scale"] > 1e-3


def test_decoding_does_not_depend_on_the_layout(results: dict[str, Any]) -> None:
    alone, split = results["decode 1"], results["decode 2"]
    assert "error" not in alone and alone == split
    assert alone["linear"] == alone["ar"]


def test_what_a_run_logs(results: dict[str, Any]) -> None:
    found = results["loggers"]
    assert "error" not in found, found["error"]
    wanted = {"loss", "ar loss", "diffusion loss", "masked share", "grad-norm", "learning-rate", "tokens per second"}
    assert wanted <= set(found["tags"])
    assert found["wandb"] == 1
