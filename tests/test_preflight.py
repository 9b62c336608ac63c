"""``nemodiff train --dry-run``, and the recipes of published sizes."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemodiff_train.cli import main
from nemodiff_train.errors import UserError
from nemodiff_train.runtime import init_runtime
from tests import small

FAMILIES: dict[str, dict[str, tuple[int, int, int, int, float]]] = {
    "ministral3": {
        "3b": (26, 3072, 32, 9216, 3.4e9),
        "8b": (34, 4096, 32, 14336, 8.4e9),
        "14b": (40, 5120, 32, 16384, 13.5e9),
    },
    "qwen3": {
        "4b": (36, 2560, 32, 9728, 4.0e9),
        "8b": (36, 4096, 32, 12288, 8.2e9),
        "14b": (40, 5120, 40, 17408, 14.8e9),
    },
}
"""Layers, hidden size, heads, feed-forward size and parameters of each published size."""


WITH_PRECISION = """
from tests import small


def recipe(start_from: str, data: str, output: str, precision: str = "bf16_mixed") -> object:
    config = small.recipe(start_from, data, output)
    config.mixed_precision = precision
    return config
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.run_inputs(tmp_path, num_hidden_layers=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry_run(*words: str) -> int:
    return main(["train", "recipe.py", "--dry-run", *words, "start_from=model", "data=data", "output=out"])


def test_ready(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(folder))
    assert dry_run() == 0
    model = sum(tensor.numel() for tensor in small.weights(folder / "model").values())
    assert f"{model:,} on the largest of 1 stages" in capsys.readouterr().out
    assert dry_run("--gpus", "8", "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2") == 0
    assert "8, 2 replicas of 4" in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == before


def test_a_published_model_in_low_precision_is_ready(folder: Path) -> None:
    """Its rope scaling, and what Megatron wraps such a model in, need no memory either."""
    shutil.rmtree(folder / "model")
    small.ministral3(folder / "model", dtype="bfloat16")
    (folder / "recipe.py").write_text(WITH_PRECISION)
    assert dry_run("--gpus", "8", "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2") == 0


BROKEN = """
import tests.small


class Broken(tests.small.recipe("model", "data", "out").dataset.__class__):
    def build_datasets(self, context: object) -> object:
        raise IndexError("no sample")


def recipe(start_from: str, data: str, output: str) -> object:
    config = tests.small.recipe(start_from, data, output)
    config.dataset.__class__ = Broken
    return config
"""


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (
            ["validation.eval_global_batch_size=7"],
            "Bridge refuses the configuration: AssertionError: eval_global_batch",
        ),
        (["model.recompute_granularity=full"], "recompute_method must be"),
        (["model.cpu_offloading=true"], "cannot build the model and its optimizer: AssertionError: CPU Offloading"),
        (["ddp.num_distributed_optimizer_instances=3"], "cannot build the model and its optimizer: AssertionError"),
        (["tokenizer.chat_template_path=nowhere"], "the data cannot be loaded: FileNotFoundError"),
        (["logger.tensorboard_dir=/proc/x"], "'/proc' cannot be written to"),
        (["dist.nccl_communicator_config_path=nowhere.yaml"], "nowhere.yaml: no such file"),
        (["optimizer.muon_tp_mode=nonsense"], "has no effect with optimizer.optimizer=adam"),
        (["logger.mlflow_experiment=a", "logger.mlflow_run_name=b"], "logger: MLFlow logging is configured, but"),
    ],
)
def test_what_ends_a_run_before_its_first_step(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], needle: str
) -> None:
    """Each of these once ended in a traceback of the run, after a dry run that said ready."""
    before = sorted(os.listdir(folder))
    assert dry_run(*words) == 2
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert needle in page and "ready" not in page and sorted(os.listdir(folder)) == before


def test_data_sets_are_built_and_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.py").write_text(BROKEN)
    assert dry_run() == 2
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the data cannot be loaded: IndexError: no sample" in page


def test_the_checkpoint_to_go_on_from_is_opened(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iteration = folder / "out" / "checkpoints" / "iter_0000005"
    iteration.mkdir(parents=True)
    (iteration / "run_config.yaml").write_text("model: {}")
    assert dry_run() == 2
    assert "iter_0000005" in (page := capsys.readouterr().out) and "ready" not in page
    (iteration.parent / ".iter_0000005.unfinished").touch()  # a run would start from its beginning
    assert dry_run() == 0


def test_what_differs_from_the_recipe_and_on_this_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run() == 0
    page = capsys.readouterr().out
    assert "not as in the recipe" not in page and "dist.distributed_backend: nccl -> gloo" in page
    assert dry_run("seq_length=128", "objective.alpha=0.5", "train.train_iters=7") == 0
    page = capsys.readouterr().out
    for line in ("dataset.seq_length: 64 -> 128", "objective.alpha: 0.3 -> 0.5", "train.train_iters: 10 -> 7"):
        assert line in page


def test_whole_configuration_is_yaml(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--yaml", "objective.alpha=0.5") == 0
    sections = yaml.safe_load(capsys.readouterr().out)
    assert sections["objective"]["alpha"] == 0.5 and sections["model"]["seq_length"] == 128
    assert sections["mixed_precision"] == "fp32" and sections["dist"]["distributed_backend"] == "gloo"
    assert main(["train", "recipe.py", "--yaml", "start_from=model", "data=data", "output=out"]) == 2
    assert "go with --dry-run" in capsys.readouterr().err


def test_all_problems_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--gpu-memory", "0.0001", "objective.block_size=24", "objective.mask_token=nope") == 2
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for needle in ("objective.block_size=24", "objective.mask_token 'nope'", "of 0.0001 GB; raise", "3 problems"):
        assert needle in page


def test_only_adapters_of_a_drafter_are_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.py").write_text("from tests.small import drafter as recipe\n")
    assert dry_run() == 2  # the model has had no joint stage
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    model = sum(tensor.numel() for tensor in small.weights(folder / "model").values())
    adapters = 4 * 16 * (64 + 64)  # layers, rank, and the width of both sides
    assert f"{model + adapters:,} on the largest" in page and f"{adapters:,} in adapters" in page


@pytest.mark.parametrize("recipe", ["recipe", "drafter", "selector"])
def test_planned_stages_are_those_that_are_built(folder: Path, recipe: str) -> None:
    """The dry run counts parameters, 'nemodiff plan' estimates them; the rest of the memory is one formula."""
    init_runtime()
    from nemodiff_train.model.provider import fit_to_host
    from nemodiff_train.planning.layouts import layout_of
    from nemodiff_train.planning.memory import estimated_stage
    from nemodiff_train.planning.workload import workload_of
    from nemodiff_train.validation.dry_run import build_stages

    config = getattr(small, recipe)("model", "data", "out")
    fit_to_host(config.model)  # what this machine builds
    config.model.pipeline_model_parallel_size = 2
    for built in build_stages(config, 2):
        planned = estimated_stage(workload_of(config), layout_of(config, 2), built.index)
        assert built.layers == planned.layers == 2
        assert built.parameters == pytest.approx(planned.parameters, rel=0.01)  # norms of heads are left out
        assert built.trained == pytest.approx(planned.trained, rel=0.01)


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["ddp.overlap_param_gather=true"], "use_distributed_optimizer=true as well"),
        (["model.tp_comm_overlap=true"], "needs Transformer Engine"),
        (["model.tp_comm_overlap=true", "evaluation.interval=5"], "excludes decoding in the loop"),
    ],
)
def test_communication_that_cannot_be_hidden(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], needle: str
) -> None:
    assert dry_run(*words) == 2
    assert needle in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["model.attention_kernel=flahs", "model.attention_tile=40"], ["use 'auto' or 'flash'", "multiple of 16"]),
        (
            ["model.attention_kernel=flash"],
            ["Hopper or data-center Blackwell", "package flash-attn-4", "whole tiles of 256"],
        ),
        (
            ["precision=bf16_with_fp8_current_scaling_mixed"],
            ["fp8 needs Transformer Engine and a GPU", "8.9 or more"],
        ),
        (["precision=bf16-with-mxfp8-mixed"], ["fp8 needs Transformer Engine and a GPU", "10.0 or more"]),
        (["precision=bf16_with_nvfp4_mixed"], ["fp4 needs Transformer Engine and a GPU"]),
        (["precision=bf16_mixd"], ["Did you mean 'bf16_mixed'?"]),
    ],
)
def test_kernels_and_formats_that_this_machine_lacks(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], needles: list[str]
) -> None:
    """In one line each, before anything is built."""
    (folder / "recipe.py").write_text(WITH_PRECISION)
    assert dry_run() == 0
    capsys.readouterr()
    assert dry_run(*words) == 2
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(needle in page for needle in needles)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_sizes(family: str, tmp_path: Path) -> None:
    """Every size and stage can be laid out on 8 to 256 GPUs, and refuses another size's checkpoint."""
    init_runtime()
    from nemodiff_train.planning import rules
    from recipes import published

    for size in FAMILIES[family]:
        save_config(family, size, tmp_path / size)
        for stage, tokens in (("ar", 10**12), ("joint", 3 * 10**11)):
            run = getattr(published, f"{family}_{size}_{stage}")(f"{tmp_path}/{size}", "data", "out")
            for gpus in (8, 16, 32, 64, 128, 256):
                assert rules.problems(run, gpus) == []
            run.comm_overlap.data_parallel_size = 8
            run.comm_overlap.finalize()
            run.comm_overlap.setup(run.model, run.optimizer, run.ddp)
            assert run.ddp.overlap_grad_reduce and run.ddp.overlap_param_gather
            step = run.train.global_batch_size * run.dataset.seq_length
            assert tokens <= run.train.train_iters * step < tokens + step
    joint = getattr(published, f"{family}_8b_joint")
    small_floats = "bf16_with_fp8_current_scaling_mixed"
    assert joint(f"{tmp_path}/8b", "data", "out", precision=small_floats).mixed_precision == small_floats
    with pytest.raises(UserError, match="this recipe is for 40 of width 5120"):
        getattr(published, f"{family}_14b_ar")(f"{tmp_path}/8b", "data", "out")


def save_config(family: str, size: str, folder: Path) -> None:
    from recipes.published import SIZES

    SIZES[family][size].config(family).save_pretrained(folder)


FOUR_SPLITS = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_published_sizes_are_built_as_planned(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of each stage, in the recipe's layout and in one of all kinds: shapes, sizes and hooks; no memory."""
    init_runtime()
    from nemodiff_train.model.provider import TriModeModelProvider, fit_to_host
    from nemodiff_train.planning.layouts import Layout, layout_of
    from nemodiff_train.planning.memory import estimated_stage
    from nemodiff_train.planning.workload import workload_of
    from nemodiff_train.validation.dry_run import build_stages
    from recipes import published

    chunks: list[Any] = []
    provide = TriModeModelProvider.provide

    def kept(self: Any, *arguments: Any, **named: Any) -> Any:
        chunks.append(provide(self, *arguments, **named))
        return chunks[-1]

    monkeypatch.setattr(TriModeModelProvider, "provide", kept)
    for size, (layers, hidden, heads, feed_forward, total) in FAMILIES[family].items():
        save_config(family, size, tmp_path / size)
        for layout in ({}, FOUR_SPLITS):
            config = getattr(published, f"{family}_{size}_joint")(f"{tmp_path}/{size}", "data", "out")
            vars(config.model).update(layout)
            if layers % 4:
                config.model.virtual_pipeline_model_parallel_size = None
            fit_to_host(config.model)
            chunks.clear()
            tensor, work = config.model.tensor_model_parallel_size, workload_of(config)
            for built in build_stages(config, 8):
                planned = estimated_stage(work, layout_of(config, 8), built.index)
                assert (built.layers, built.parameters) == (
                    planned.layers,
                    pytest.approx(planned.parameters, rel=1e-4),
                )
            shapes = {
                "linear_qkv": ((heads + 16) * 128 // tensor, hidden),
                "linear_proj": (hidden, heads * 128 // tensor),
                "linear_fc1": (2 * feed_forward // tensor, hidden),
                "linear_fc2": (hidden, feed_forward // tensor),
            }
            for name, module in ((name, module) for chunk in chunks for name, module in chunk.named_modules()):
                if (shape := shapes.get(name.rpartition(".")[2])) is not None:
                    assert module.weight.shape == shape and module.weight.is_meta
                    assert module._forward_hooks or name.endswith("linear_proj")  # frees its input
            assert sum(len(chunk.decoder.layers) for chunk in chunks) == layers
            whole = estimated_stage(work, Layout(1, 1, 1, 1, 1, recompute=False), 0)
            assert whole.parameters == pytest.approx(total, rel=0.02)


def test_names_of_recipes() -> None:
    """A name of ``recipes/`` or FILE.py[:function]; anything else is refused with the nearest one."""
    from nemodiff_train.config.registry import check_recipe, recipe_modules, split_file

    names = set(recipe_modules())
    models = [f"{family}_{size}" for family in FAMILIES for size in FAMILIES[family]]
    sizes = {f"{model}_{stage}" for model in models for stage in ("ar", "joint")}
    demo = {f"demo_{stage}" for stage in ("ar", "joint", "sft", "drafter")}
    assert names == sizes | demo | {
        "joint",
        "sft",
        "drafter",
        "smollm2_joint",
        "smollm2_drafter",
        "smollm2_drafter_uno",
        "smollm2_selector",
        "drafter_uno",
        "demo_drafter_uno",
        "selector",
        "demo_selector",
    }
    assert split_file("a b.py") == (Path("a b.py"), "recipe") and split_file("x/y.py:run") == (Path("x/y.py"), "run")
    assert split_file("joint") is None
    with pytest.raises(UserError, match="Did you mean 'ministral3_8b_joint'"):
        check_recipe("ministral3_8b_jiont")


def test_a_function_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text("from tests.small import chat, recipe as first\n")
    words = ["--dry-run", "start_from=model", "data=data", "output=out"]
    assert main(["train", "mine.py:first", *words]) == 0
    capsys.readouterr()
    assert main(["train", "mine.py", *words]) == 2
    assert "'mine.py' has no function 'recipe'" in capsys.readouterr().err
