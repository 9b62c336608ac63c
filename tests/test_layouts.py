"""Every layout trains the same model; a stopped run continues exactly.  One gang runs it all."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests import gang, matrix, small
from tests.gang import Job
from tests.matrix import Layout

SETTINGS = ("checkpoint.save_interval=0", "train.micro_batch_size=4")  # as in the matrix


def _plan(folder: Path) -> list[Job]:
    shared = {"start_from": str(folder / "qwen3"), "data": str(folder / "data")}
    one = str(folder / "one process")

    def run(name: str, function: str, settings: tuple[str, ...] = (), **more: Any) -> Job:
        arguments = {**shared, "output": str(folder / name), "settings": [*SETTINGS, *settings], **more}
        return Job(name, 1, f"jobs:{function}", arguments)

    jobs = [
        *(matrix.job(layout, folder) for layout in (*matrix.REFERENCES, *matrix.LAYOUTS)),
        run("resumed", "resume", stopped=one, at=matrix.HALF_WAY),
        run("bf16", "train", ("mixed_precision=bf16_mixed",)),
        run("mask row", "warnings", ("train.train_iters=1",), start_from=str(folder / "decayed")),
        run("ar stage", "train", ("train.train_iters=2",), stage="ar"),
        run("ar stage, documents", "train", ("train.train_iters=2", *matrix.DOCUMENTS), stage="ar"),
        run("told", "train", ("diagnostics.loss_interval=5",)),
        run("evaluated", "train", matrix.evaluated(folder)),
        run("loggers", "loggers", ("diagnostics.loss_interval=1",)),
    ]
    ar_split = {**shared, "output": str(folder / "ar split"), "stage": "ar"}
    ar_split["settings"] = [*SETTINGS, *matrix.CP2, *matrix.PP2, "train.train_iters=2"]
    jobs.append(Job("ar stage, context 2 x pipeline 2", 4, "jobs:train", ar_split))
    for name, world, layout in EVALUATED:
        split = {**shared, "output": str(folder / f"evaluated {name}")}
        split["settings"] = [*SETTINGS, *layout, *matrix.evaluated(folder)]
        jobs.append(Job(f"evaluated {name}", world, "jobs:train", split))
    for family in ("qwen3", "ministral3"):
        for tensor, pipeline in ((1, 1), (2, 1), (1, 2)):
            arguments = {"source": str(folder / family), "tensor": tensor, "pipeline": pipeline}
            jobs.append(Job(f"logits {family} {tensor} {pipeline}", tensor * pipeline, "jobs:ar_logits", arguments))
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
        arguments = {"checkpoint": f"{one}/checkpoints", "tensor": tensor, "pipeline": pipeline}
        jobs.append(Job(f"decode {tensor} {pipeline}", tensor * pipeline, "jobs:decode", arguments))
    jobs += _conversions(folder)
    for size in (2, 4):
        jobs.append(Job(f"exchange {size}", size, "jobs:exchange", {"size": size}))
    return jobs


def _conversions(folder: Path) -> list[Job]:
    """Checkpoints that four ranks write and read, with a vocabulary that two cannot share evenly."""
    layout = ["--tensor-parallel", "2", "--pipeline-parallel", "2"]
    jobs = []
    for name in ("untied", "tied"):
        source, split, one = (str(folder / f"uneven-{name}{part}") for part in ("", "-split", "-one"))
        shards = ["--max-shard-size", "200KB"]
        commands = [
            ["import", source, split, *layout],
            ["export", split, f"{split}-out", *shards, *layout],
            ["export", one, f"{one}-out", *layout],
        ]
        jobs.append(Job(f"convert {name}", 1, "jobs:convert", {"commands": [["import", source, one]]}))
        jobs.append(Job(f"convert {name}, four ranks", 4, "jobs:convert", {"commands": commands}))
        alone = [["export", split, f"{split}-alone"]]
        jobs.append(Job(f"convert {name} back", 1, "jobs:convert", {"commands": alone}))
    refused = [["import", str(folder / "uneven-damaged"), str(folder / "refused"), *layout]]
    return [*jobs, Job("convert damaged", 4, "jobs:convert", {"commands": refused})]


def _prepare_conversions(folder: Path) -> None:
    for name in ("untied", "tied", "damaged"):
        small.qwen3(folder / f"uneven-{name}", vocab_size=321, tie_word_embeddings=name == "tied")
    damaged = small.weights(folder / "uneven-damaged")
    damaged["model.norm.weight"][0] = float("nan")
    save_file(damaged, folder / "uneven-damaged" / "model.safetensors")


EVALUATED = [
    ("tensor 2 + sequence x pipeline 2 x virtual 2", 4, [*matrix.SP2, *matrix.VPP2]),
    ("context 2 x data 2, sharded optimizer", 4, [*matrix.CP2, *matrix.SHARDED]),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gang")
    matrix.prepare(folder)
    small.qwen3(folder / "decayed", mask_row=0.01)
    small.ministral3(folder / "ministral3")
    _prepare_conversions(folder)
    # What reads the results finds the folder with them.
    return {"folder": folder} | gang.run(_plan(folder), folder)


def steps(results: dict[str, Any], name: str) -> list[dict[str, float]]:
    assert "error" not in results[name], results[name]["error"]
    found: list[dict[str, float]] = results[name]["steps"]
    return found


@pytest.mark.parametrize("layout", matrix.LAYOUTS, ids=lambda layout: layout.name)
def test_ten_steps_are_the_same_training(results: dict[str, Any], layout: Layout) -> None:
    found = matrix.difference(layout, steps(results, layout.name), steps(results, layout.like))
    assert max(found.values()) <= matrix.TOLERANCE, found


def test_the_references_are_different_trainings(results: dict[str, Any]) -> None:
    """The noise moves from step to step, and each switch of the matrix does something."""
    one = steps(results, "one process")
    assert one[0]["diffusion_loss"] != one[1]["diffusion_loss"]
    for reference in matrix.REFERENCES[1:]:
        assert steps(results, reference.name)[-1]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-3)


def test_bf16_with_fp32_master_weights(results: dict[str, Any]) -> None:
    """Near the fp32 curve: bf16 has 8 bits, so 2e-2 relative."""
    for mine, reference in zip(steps(results, "bf16"), steps(results, "one process"), strict=True):
        assert mine["masked_fraction"] == reference["masked_fraction"]
        assert mine["loss"] == pytest.approx(reference["loss"], rel=2e-2) and mine["loss"] != reference["loss"]


def test_a_resumed_run_continues_bit_for_bit(results: dict[str, Any]) -> None:
    expected, found = steps(results, "one process")[5:], steps(results, "resumed")
    assert [step["step"] for step in found] == [6, 7, 8, 9, 10]
    for mine, reference in zip(found, expected, strict=True):
        for name in ("loss", "ar_loss", "diffusion_loss", "masked_fraction", "grad_norm"):
            assert mine[name] == reference[name]


def test_the_ar_stage_has_no_diffusion(results: dict[str, Any]) -> None:
    first = steps(results, "ar stage")[0]
    assert "diffusion_loss" not in first and "masked_fraction" not in first
    # The clean half of the joint stage is the AR model's view of the same samples.
    assert first["ar_loss"] == pytest.approx(steps(results, "one process")[0]["ar_loss"], rel=1e-5)


@pytest.mark.parametrize("layout", ["1 1", "2 1", "1 2"])
@pytest.mark.parametrize("family", ["qwen3", "ministral3"])
def test_imported_logits_are_transformers(results: dict[str, Any], family: str, layout: str) -> None:
    found = results[f"logits {family} {layout}"]
    assert "error" not in found, found["error"]
    assert found["difference"] < 1e-4
    if family == "ministral3":
        assert found["without_scale"] > 1e-3


@pytest.mark.parametrize("layout", ["2 1", "1 2", "2 2"])
def test_decoding_does_not_depend_on_the_layout(results: dict[str, Any], layout: str) -> None:
    alone, split = results["decode 1 1"], results[f"decode {layout}"]
    assert "error" not in alone and alone == split
    assert alone["linear"] == alone["quadratic"] == alone["oracle"] == alone["ar"]


def test_what_a_run_logs(results: dict[str, Any]) -> None:
    found = results["loggers"]
    assert "error" not in found, found["error"]
    wanted = {
        "loss",
        "ar_loss",
        "diffusion_loss",
        "masked_fraction",
        "grad-norm",
        "learning-rate",
        "tokens_per_second",
    }
    wanted |= {"diffusion_loss_by_position/1", "diffusion_loss_by_position/9-16"}
    assert wanted <= set(found["tags"])
    assert found["wandb"] == 1


def test_the_ar_stage_with_documents_and_split(results: dict[str, Any]) -> None:
    documents, joint = steps(results, "ar stage, documents")[0], steps(results, "documents, one process")[0]
    assert documents["ar_loss"] == pytest.approx(joint["ar_loss"], rel=1e-5)
    assert documents["ar_loss"] != pytest.approx(steps(results, "ar stage")[0]["ar_loss"], rel=1e-3)
    for whole, split in zip(
        steps(results, "ar stage"), steps(results, "ar stage, context 2 x pipeline 2"), strict=True
    ):
        for name in ("ar_loss", "grad_norm"):
            assert split[name] == pytest.approx(whole[name], rel=1e-5)


def test_a_decayed_mask_row_is_reported(results: dict[str, Any]) -> None:
    assert "error" not in results["mask row"], results["mask row"]
    told = " ".join(results["mask row"]["console"].split())
    assert "mask token 1 is 1." in told and "objective.mask_embedding_noise=1" in told
    assert "mask_embedding_noise" not in results["loggers"]["console"]


def test_a_run_tells_its_loss_by_noise_level_and_place(results: dict[str, Any]) -> None:
    fifth, last = (steps(results, "told")[step] for step in (4, 9))
    by_level = [value for name, value in last.items() if name.startswith("diffusion_loss_by_noise_level/")]
    by_place = [value for name, value in last.items() if name.startswith("diffusion_loss_by_position/")]
    assert len(by_level) >= 8 and len(by_place) == 5  # blocks of 16: 1, 2, 3-4, 5-8, 9-16
    assert all(2 < value < 12 for value in by_level + by_place)
    assert "diffusion_loss_by_position/1" in fifth and "diffusion_loss_by_position/1" not in steps(results, "told")[3]


@pytest.mark.parametrize("layout", [name for name, *_ in EVALUATED])
def test_evaluation_in_the_loop_changes_nothing(results: dict[str, Any], layout: str) -> None:
    """Bit-identical losses, and the same figures under every layout, twice in ten steps."""
    alone, split = steps(results, "evaluated"), steps(results, f"evaluated {layout}")
    for found, without in ((alone, "one process"), (split, layout)):
        for mine, reference in zip(found, steps(results, without), strict=True):
            assert all(mine[name] == reference[name] for name in matrix.FIGURES)
    for step in (4, 9):
        figures = {name for name in alone[step] if name.startswith("eval/")}
        assert {"eval/tpf/linear", "eval/accuracy/diffusion", "eval/seconds"} <= figures
        assert figures == {name for name in split[step] if name.startswith("eval/")}
        for name in figures - {"eval/seconds"}:
            assert split[step][name] == pytest.approx(alone[step][name], rel=1e-6)
        assert alone[step]["eval/tpf/ar"] == 1
    assert "eval/seconds" not in alone[3]


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_exchange_clean_keys_and_values_once(results: dict[str, Any], size: int) -> None:
    """L = 4096, one layer: a rank receives at most the clean keys and values, in one collective."""
    found = results[f"exchange {size}"]
    assert "error" not in found, found["error"]
    assert found["collectives"] == 1
    assert found["received"] <= found["clean"] * (size - 1) // size
    assert found["difference"] < 1e-5


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_four_ranks_convert_as_one_does(results: dict[str, Any], name: str) -> None:
    for job, commands in ((f"convert {name}", 1), (f"convert {name}, four ranks", 3), (f"convert {name} back", 1)):
        assert "error" not in results[job], results[job]["error"]
        assert results[job]["codes"] == [0] * commands
    folder: Path = results["folder"]
    before = small.weights(folder / f"uneven-{name}")
    for output in ("split-out", "one-out", "split-alone"):
        assert small.same(before, small.weights(folder / f"uneven-{name}-{output}")), output
    assert len(list((folder / f"uneven-{name}-split-out").glob("*.safetensors"))) > 2


def test_ranks_refuse_together(results: dict[str, Any]) -> None:
    assert results["convert damaged"] == {"codes": [2]}
    assert not list(results["folder"].glob("*refused*"))
