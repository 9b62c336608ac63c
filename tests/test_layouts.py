"""Every layout of ranks trains the same model as one rank, decodes the same tokens and converts the same weights.

Runs are made when a test asks for them: ``pytest tests/test_layouts.py -k "[tp2]"`` trains on one rank and under one
layout.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import jobs, small
from tests.browser import read_page
from tools.support import layouts
from tools.support.layouts import FIGURES, LAYOUTS, REFERENCES, SETTINGS, TOLERANCE, Steps
from tools.support.ranks import Jobs, RankPool


class Runs(Jobs):
    """The jobs of this module."""

    def steps(self, name: str) -> Steps:
        """Return the steps of a training run."""
        steps: Steps = self[name]["steps"]
        return steps

    def train(self, name: str, *settings: str, world_size: int = 1, **arguments: str) -> None:
        """Add a training run of the Qwen 3."""
        self.add(name, world_size, jobs.train, **self.arguments(name, *settings, **arguments))

    def arguments(self, name: str, *settings: str, **arguments: str) -> dict[str, Any]:
        """Return the arguments of a training run of the Qwen 3."""
        inputs = {"start_from": str(self.folder / "qwen3"), "data": str(self.folder / "data")}
        return {**inputs, "output": str(self.folder / name), "settings": [*SETTINGS, *settings], **arguments}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Runs:
    folder = tmp_path_factory.mktemp("layouts")
    layouts.prepare(folder)
    runs = Runs(ranks, folder)
    for name, layout in {**REFERENCES, **LAYOUTS}.items():
        layouts.add(runs, name, layout)
    return runs


@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_steps_are_the_same_training(runs: Runs, name: str) -> None:
    layout = LAYOUTS[name]
    differences = layouts.difference(layout, runs.steps(name), runs.steps(layout.like))
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "one"])
def test_the_references_are_different_trainings(runs: Runs, name: str) -> None:
    assert runs.steps(name)[-1]["loss"] != pytest.approx(runs.steps("one")[-1]["loss"], rel=1e-3)


def test_noise_moves_from_step_to_step(runs: Runs) -> None:
    first, second, *_ = runs.steps("one")
    assert first["diffusion_loss"] != second["diffusion_loss"]


def test_bf16_with_fp32_master_weights(runs: Runs) -> None:
    """Losses are near those of fp32: bf16 has 8 bits, so 2e-2 relative."""
    runs.train("bf16", "mixed_precision=bf16_mixed")
    for step, expected in zip(runs.steps("bf16"), runs.steps("one"), strict=True):
        assert step["masked_fraction"] == expected["masked_fraction"]
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-2) and step["loss"] != expected["loss"]


def test_a_resumed_run_continues_bit_for_bit(runs: Runs) -> None:
    stopped: dict[str, Any] = {"stopped": str(runs.folder / "one"), "step": layouts.HALF_WAY}
    runs.add("resumed", 1, jobs.resume, after="one", **stopped, **runs.arguments("resumed"))
    steps, expected = runs.steps("resumed"), runs.steps("one")[layouts.HALF_WAY :]
    assert [step["step"] for step in steps] == [6, 7, 8, 9, 10]
    assert all(_same(*pair) for pair in zip(steps, expected, strict=True))


def _same(step: dict[str, float], other: dict[str, float]) -> bool:
    """Return whether all figures are the same to the bit."""
    return all(step[figure] == other[figure] for figure in FIGURES)


def test_the_ar_stage_has_no_diffusion(runs: Runs) -> None:
    runs.train("ar", "train.train_iters=2", stage="ar")
    first = runs.steps("ar")[0]
    assert "diffusion_loss" not in first and "masked_fraction" not in first
    # The clean half of the joint stage is the AR model's view of the same samples.
    assert first["ar_loss"] == pytest.approx(runs.steps("one")[0]["ar_loss"], rel=1e-5)


def test_the_ar_stage_separates_documents(runs: Runs) -> None:
    runs.train("ar_documents", "train.train_iters=2", *layouts.DOCUMENTS, stage="ar")
    documents, joint = runs.steps("ar_documents")[0], runs.steps("documents_one")[0]
    assert documents["ar_loss"] == pytest.approx(joint["ar_loss"], rel=1e-5)
    assert documents["ar_loss"] != pytest.approx(runs.steps("one")[0]["ar_loss"], rel=1e-3)


def test_the_ar_stage_does_not_depend_on_the_layout(runs: Runs) -> None:
    runs.train("ar_pair", "train.train_iters=2", stage="ar")
    settings = (*layouts.CP2, *layouts.PP2, "train.train_iters=2")
    runs.train("ar_cp2_pp2", *settings, world_size=4, stage="ar")
    for step, expected in zip(runs.steps("ar_cp2_pp2"), runs.steps("ar_pair"), strict=True):
        for figure in ("ar_loss", "grad_norm"):
            assert step[figure] == pytest.approx(expected[figure], rel=1e-5)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)], ids=["one", "tp2", "pp2"])
@pytest.mark.parametrize("family", ["qwen3", "ministral3"])
def test_imported_logits_are_transformers(runs: Runs, family: str, tensor: int, pipeline: int) -> None:
    name = f"logits_{family}_tp{tensor}_pp{pipeline}"
    source = runs.folder / family
    if not source.exists():
        small.ministral3(source)
    runs.add(name, tensor * pipeline, jobs.ar_logits, source=str(source), tensor=tensor, pipeline=pipeline)
    assert runs[name]["difference"] < 1e-4
    if family == "ministral3":
        assert runs[name]["without_scale"] > 1e-3


@pytest.fixture(scope="module")
def decoded(runs: Runs) -> Runs:
    """Add decoding of the run on one rank under every layout."""
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
        arguments = {"checkpoint": str(runs.folder / "one" / "checkpoints"), "tensor": tensor, "pipeline": pipeline}
        runs.add(f"decode_tp{tensor}_pp{pipeline}", tensor * pipeline, jobs.decode, after="one", **arguments)
    return runs


@pytest.mark.parametrize("name", ["tp2_pp1", "tp1_pp2", "tp2_pp2"])
def test_decoding_does_not_depend_on_the_layout(decoded: Runs, name: str) -> None:
    assert decoded[f"decode_{name}"] == decoded["decode_tp1_pp1"]


def test_lossless_modes_decode_as_ar(decoded: Runs) -> None:
    modes = decoded["decode_tp1_pp1"]
    assert modes["linear"] == modes["tree"] == modes["quadratic"] == modes["oracle"] == modes["ar"]


@pytest.fixture(scope="module")
def logged(runs: Runs) -> Runs:
    """Add a run of two steps with all loggers."""
    runs.add("loggers", 1, jobs.loggers, **runs.arguments("loggers", "diagnostics.loss_interval=1"))
    return runs


def test_what_a_run_logs(logged: Runs) -> None:
    wanted = {"loss", "ar_loss", "diffusion_loss", "masked_fraction", "grad-norm", "params-norm", "learning-rate"}
    wanted |= {"tokens_per_second", "diffusion_loss_by_position/1", "diffusion_loss_by_position/9-16"}
    assert wanted <= set(logged["loggers"]["tags"])
    assert logged["loggers"]["wandb"] == 1


def test_ranks_wait_for_one_another_only_where_a_checkpoint_is_published(runs: Runs) -> None:
    """Bridge asks for finished saves at every step; a barrier there would wait for the device."""
    settings = ("train.train_iters=6", "checkpoint.save_interval=4")
    runs.add("barriers", 2, jobs.barriers, **runs.arguments("barriers", *settings))
    counted = runs["barriers"]
    assert set(counted["asked"]) == set(range(7))
    assert set(counted["waited"]) - {0} == {4, 6}


def test_a_decayed_mask_row_is_reported(logged: Runs) -> None:
    small.qwen3(logged.folder / "decayed", mask_row=0.01)
    decayed = logged.arguments("decayed_run", "train.train_iters=2", start_from=str(logged.folder / "decayed"))
    logged.add("decayed", 1, jobs.warnings, **decayed)
    printed = " ".join(logged["decayed"]["console"].split())
    assert "mask token 1 is 1." in printed and "objective.mask_embedding_noise=1" in printed
    assert "mask_embedding_noise" not in logged["loggers"]["console"]


def test_loss_by_noise_level_and_position(runs: Runs) -> None:
    runs.train("diagnosed", "diagnostics.loss_interval=5")
    _, _, _, fourth, fifth, *_, last = runs.steps("diagnosed")
    by_level = [value for key, value in last.items() if key.startswith("diffusion_loss_by_noise_level/")]
    by_position = [value for key, value in last.items() if key.startswith("diffusion_loss_by_position/")]
    assert len(by_level) >= 8 and len(by_position) == 5  # blocks of 16: 1, 2, 3-4, 5-8, 9-16
    assert all(2 < value < 12 for value in by_level + by_position)
    assert "diffusion_loss_by_position/1" in fifth and "diffusion_loss_by_position/1" not in fourth


@pytest.mark.parametrize("name", ["one", "sp2_pp2_vpp2", "cp2_dp2_sharded"])
def test_evaluation_in_the_loop_changes_nothing(runs: Runs, name: str) -> None:
    """Losses are the same to the bit with decoding every five steps, and its figures under every layout."""
    steps, alone = (_evaluated(runs, layout) for layout in (name, "one"))
    assert all(_same(*pair) for pair in zip(steps, runs.steps(name), strict=True))
    for step, expected in ((steps[4], alone[4]), (steps[9], alone[9])):
        figures = {key for key in step if key.startswith("eval/")}
        assert {"eval/tpf/linear", "eval/accuracy/diffusion", "eval/seconds"} <= figures
        assert figures == {key for key in expected if key.startswith("eval/")}
        for key in figures - {"eval/seconds"}:
            assert step[key] == pytest.approx(expected[key], rel=1e-6)
        assert step["eval/tpf/ar"] == 1
    assert "eval/seconds" not in steps[3]
    page = read_page(runs.folder / f"evaluated_{name}" / "index.html")
    assert not page.loads and page.seen.count("figure") == page.seen.count("svg") == 7
    for words in ("Losses", "Learning rate", "Throughput", "Tokens per forward", "block_size: 16", "step 10 of 10"):
        assert words in page.words
    assert page.words.count("Block diffusion") == 7  # a tab, and six prompts


def _evaluated(runs: Runs, name: str) -> Steps:
    """Return the steps of a layout with decoding every five of them."""
    if (evaluated := f"evaluated_{name}") not in set(runs):
        layout = {**REFERENCES, **LAYOUTS}[name]
        settings = (*layout.settings, *layouts.evaluated(runs.folder))
        runs.train(evaluated, *settings, world_size=layout.world_size)
    return runs.steps(evaluated)


VALIDATION = (
    "dataset.split=70,30,0",
    "dataset.reset_attention_mask=true",
    "dataset.eod_mask_loss=true",
    "validation.eval_interval=1",
    "validation.eval_iters=3",
    "train.train_iters=1",
    "scheduler.lr_warmup_iters=0",
    "optimizer.lr=1e-12",
    "optimizer.min_lr=0",
)
VALIDATED = {
    "micro1": (1, ["train.micro_batch_size=1"]),
    "micro2": (1, ["train.micro_batch_size=2"]),
    "dp2": (2, ["train.micro_batch_size=2"]),
    "sp2_pp2": (4, [*layouts.SP2, *layouts.PP2, "train.micro_batch_size=2"]),
    "cp2": (2, [*layouts.CP2, "train.micro_batch_size=1"]),
}


@pytest.mark.parametrize(
    ("name", "reduction"),
    [*((name, "global") for name in VALIDATED), ("micro1", "bridge"), ("dp2", "bridge"), ("dp2", "automodel")],
)
def test_validation_is_a_mean_over_tokens(runs: Runs, name: str, reduction: str) -> None:
    """Documents' ends are not counted, so micro-batches differ in tokens; no split or reduction changes a mean."""
    found, expected = _validated(runs, name, reduction), _validated(runs, "whole", "global")
    assert {"loss validation", "ar_loss validation", "diffusion_loss validation"} <= set(expected)
    assert found == pytest.approx(expected, rel=1e-5)


def _validated(runs: Runs, name: str, reduction: str) -> dict[str, float]:
    """Return what TensorBoard has of the validation on 24 samples, after a step that changes nothing."""
    job = f"validated_{name}_{reduction}"
    folder = runs.folder / job / "tensorboard"
    if job not in set(runs):
        world_size, settings = {**VALIDATED, "whole": (1, ["train.micro_batch_size=8"])}[name]
        settings = [*VALIDATION, *settings, f"objective.reduction={reduction}", f"logger.tensorboard_dir={folder}"]
        runs.train(job, *settings, world_size=world_size)
    assert runs.steps(job)
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if "validation" in tag}


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_exchange_clean_keys_and_values_once(ranks: RankPool, size: int) -> None:
    """L = 4096, one layer: a rank receives at most the clean keys and values, in one collective."""
    exchange = ranks.call(f"exchange_cp{size}", size, jobs.exchange, size=size)
    assert exchange["collectives"] == 1
    assert exchange["received"] <= exchange["clean"] * (size - 1) // size
    assert exchange["difference"] < 1e-5


TP2_PP2 = ["--tensor-parallel", "2", "--pipeline-parallel", "2"]


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_four_ranks_convert_as_one_does(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """A vocabulary that two ranks cannot share evenly comes back as it was, from either kind of checkpoint."""
    source = tmp_path / "source"
    small.qwen3(source, num_hidden_layers=4, vocab_size=321, tie_word_embeddings=name == "tied")
    split, one = str(tmp_path / "split"), str(tmp_path / "one")
    on_one = [["import", str(source), one]]
    on_four = [
        ["import", str(source), split, *TP2_PP2],
        ["export", split, f"{split}-out", "--max-shard-size", "200KB", *TP2_PP2],
        ["export", one, f"{one}-out", *TP2_PP2],
    ]
    back = [["export", split, f"{split}-alone"]]
    for world_size, commands in ((1, on_one), (4, on_four), (1, back)):
        codes = ranks.call(f"convert_{name}", world_size, jobs.convert, logs=tmp_path, commands=commands)["codes"]
        assert codes == [0] * len(commands)
    before = small.weights(source)
    for output in (f"{split}-out", f"{one}-out", f"{split}-alone"):
        assert small.same(before, small.weights(Path(output))), output
    assert len(list(Path(f"{split}-out").glob("*.safetensors"))) > 2


def test_all_ranks_refuse_damaged_weights(ranks: RankPool, tmp_path: Path) -> None:
    small.qwen3(tmp_path / "damaged")
    weights = small.weights(tmp_path / "damaged")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "damaged" / "model.safetensors")
    command = ["import", str(tmp_path / "damaged"), str(tmp_path / "refused"), *TP2_PP2]
    assert ranks.call("convert_damaged", 4, jobs.convert, commands=[command]) == {"codes": [2]}
    assert not list(tmp_path.glob("*refused*"))
