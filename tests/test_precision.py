"""One rule: what is stored, trained in and saved; see docs/training.md, "Precision"."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemodiff_train.errors import UserError
from tests import jobs, small
from tools.support.ranks import RankPool

DTYPES = ("bfloat16", "float16", "float32")
TIED = {"bfloat16": True, "float16": False, "float32": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nemodiff_train.conversion.importing import import_checkpoint
    from nemodiff_train.model.hf_directory import HFDirectory

    folder = tmp_path_factory.mktemp("precision")
    small.data(folder / "data")
    for dtype in DTYPES:
        small.qwen3(folder / dtype, dtype=dtype, tie_word_embeddings=TIED[dtype])
        import_checkpoint(HFDirectory(folder / dtype), str(folder / f"{dtype}-imported"))
    return folder


def config_of(start: Path, output: Path | None = None) -> Any:
    return small.recipe(str(start), str(start.parent / "data"), str(output or start.parent / "nothing"))


def test_a_gpu_trains_16_bits_in_bf16_and_a_cpu_everything_in_fp32(folder: Path) -> None:
    from nemodiff_train.config.precision import is_mixed, precision_of, slow_precision_warning

    for dtype, on_gpu in zip(DTYPES, ("bf16_mixed", "bf16_mixed", "fp32"), strict=True):
        config = config_of(folder / dtype)
        assert (precision_of(config, True), precision_of(config, False)) == (on_gpu, "fp32")
        config.mixed_precision = "fp16_mixed"  # a name is a name
        assert precision_of(config, True) == precision_of(config, False) == "fp16_mixed"
    assert "mixed_precision=fp32" in str(slow_precision_warning("bf16_mixed", False))
    assert slow_precision_warning("bf16_mixed", True) is slow_precision_warning("fp32", False) is None
    assert is_mixed("bf16_mixed") and is_mixed("no such name") and not is_mixed("fp32")


def test_the_files_decide_not_config_json(folder: Path, tmp_path: Path) -> None:
    from nemodiff_train.config.precision import precision_of

    small.qwen3(tmp_path / "model", dtype="bfloat16")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}))
    assert precision_of(config_of(tmp_path / "model"), True) == "bf16_mixed"


def train_every_dtype(folder: str) -> dict[str, Any]:
    """Train two steps from each dtype, from the directory and from its import, without naming a precision."""
    from nemodiff_train.model.checkpoint import Checkpoint

    settings = ["train.train_iters=2", "checkpoint.save_interval=2"]
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for start in (dtype, f"{dtype}-imported"):
            output, words = f"{folder}/run-{start}", {"start_from": f"{folder}/{start}", "data": f"{folder}/data"}
            steps = jobs.train(output=output, settings=settings, **words)["steps"]
            saved = Checkpoint.open(f"{output}/checkpoints").run_config["model"]
            found[start] = {"loss": steps[1]["loss"], "bf16": saved["bf16"], "fp16": saved["fp16"]}
    try:
        words = {"start_from": f"{folder}/bfloat16", "data": f"{folder}/data"}
        jobs.train(output=f"{folder}/run-bfloat16", settings=[*settings, "mixed_precision=bf16_mixed"], **words)
    except UserError as error:
        found["refused"] = str(error)
    return found


def test_every_dtype_trains_on_a_cpu_and_is_saved_as_trained(folder: Path, ranks: RankPool) -> None:
    from nemodiff_train.config.precision import precision_of

    found = ranks.call("train", 1, train_every_dtype, logs=folder, folder=str(folder))
    assert "was saved with fp32" in found.pop("refused")
    resumed = config_of(folder / "bfloat16", folder / "run-bfloat16")
    assert precision_of(resumed, True) == "fp32"  # a run goes on as it began, on a GPU as well
    for start, run in found.items():
        assert not run["bf16"] and not run["fp16"]
        assert run["loss"] == found[start.removesuffix("-imported")]["loss"]  # the same weights
    assert len({run["loss"] for run in found.values()}) == len(DTYPES)


def test_a_cpu_decodes_16_bits_in_fp32_and_exports_them_as_they_are(folder: Path, tmp_path: Path) -> None:
    from nemodiff_train.conversion.exporting import export_checkpoint
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.model.checkpoint import Checkpoint

    imported = Checkpoint.open(folder / "bfloat16-imported")
    loaded = load_decoding_model(imported, modes=("ar",))
    assert {parameter.dtype for parameter in loaded.model[0].parameters()} == {torch.float32}
    export_checkpoint(imported, str(tmp_path / "back"))
    assert small.same(small.weights(folder / "bfloat16"), small.weights(tmp_path / "back"))
