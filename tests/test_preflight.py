"""``nemodiff train --dry-run``, and the recipes of published sizes."""

import importlib
import os
from pathlib import Path

import pytest
from transformers import Ministral3Config, Qwen3Config

from nemodiff_train.cli import main
from nemodiff_train.errors import UserError
from nemodiff_train.runtime import init_runtime
from tests import small

FAMILIES = {"ministral3": Ministral3Config, "qwen3": Qwen3Config}


WITH_PRECISION = """
from tests import small


def recipe(start_from: str, data: str, output: str, precision: str = "bf16_mixed") -> object:
    config = small.recipe(start_from, data, output)
    config.mixed_precision = precision
    return config
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.qwen3(tmp_path / "model")
    small.data(tmp_path / "data", documents=20)
    (tmp_path / "recipe.py").write_text("from tests.small import recipe\n")
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


def test_all_problems_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--gpu-memory", "0.0001", "objective.block_size=24", "objective.mask_token=nope") == 2
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for needle in ("objective.block_size=24", "objective.mask_token 'nope'", "0.0001 GB; raise", "3 problems"):
        assert needle in page


def test_of_a_drafter_only_adapters_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as a training has, and their gradients and optimizer state alone."""
    (folder / "recipe.py").write_text("from tests.small import drafter as recipe\n")
    assert dry_run("--gpu-memory", "0.001") == 2  # the model has had no joint stage
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    model = sum(tensor.numel() for tensor in small.weights(folder / "model").values())
    adapters = 4 * 16 * (64 + 64)  # layers, rank, and the width of both sides
    assert f"{model + adapters:,} on the largest" in page and f"{adapters:,} in adapters" in page
    assert "a GPU, which has" not in page  # 4 bytes a frozen weight; 16 would not fit


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
    from nemodiff_train.validation.layout import layout_problems

    page = importlib.import_module(f"recipes.{family}")
    for size, shape in page.SIZES.items():
        rope = {"rope_parameters": small.YARN} if family == "ministral3" else {}
        config = FAMILIES[family](
            architectures=[f"{family.capitalize()}ForCausalLM"],
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            **rope,
        )
        config.save_pretrained(tmp_path / size)
        for stage, tokens in (("ar", 10**12), ("joint", 3 * 10**11)):
            run = page.recipe(size, stage, f"{tmp_path}/{size}", "tokenizer", "data", "out")
            for gpus in (8, 16, 32, 64, 128, 256):
                assert layout_problems(run, gpus) == []
            run.comm_overlap.data_parallel_size = 8
            run.comm_overlap.finalize()
            run.comm_overlap.setup(run.model, run.optimizer, run.ddp)
            assert run.ddp.overlap_grad_reduce and run.ddp.overlap_param_gather
            step = run.train.global_batch_size * run.dataset.seq_length
            assert tokens <= run.train.train_iters * step < tokens + step
    small_floats = "bf16_with_fp8_current_scaling_mixed"
    run = page.recipe("8b", "joint", f"{tmp_path}/8b", "tokenizer", "data", "out", precision=small_floats)
    assert run.mixed_precision == small_floats
    with pytest.raises(UserError, match="size=14b"):
        page.recipe("14b", "ar", f"{tmp_path}/8b", "tokenizer", "data", "out")
    with pytest.raises(UserError, match=r"unknown stage.*'joint'"):
        page.recipe("8b", "jiont", f"{tmp_path}/8b", "tokenizer", "data", "out")
