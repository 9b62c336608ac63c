"""``nemodiff convert verify`` finds each way in which one implementation can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemodiff_train.cli import main
from tests import small

Weights = dict[str, Tensor]
Settings = dict[str, Any]


def swapped_head(weights: Weights, settings: Settings) -> None:
    rows = weights["model.layers.1.self_attn.q_proj.weight"].view(4, 16, -1)
    rows[[0, 1]] = rows[[1, 0]]


def scaled_query(weights: Weights, settings: Settings) -> None:
    weights["model.layers.2.self_attn.q_proj.weight"] *= 4  # the square root of a head's width


def dropped_layer(weights: Weights, settings: Settings) -> None:
    settings["num_hidden_layers"] -= 1
    for name in [name for name in weights if ".layers.3." in name]:
        del weights[name]


def wrong_norm(weights: Weights, settings: Settings) -> None:
    weights["model.layers.2.post_attention_layernorm.weight"] = weights[
        "model.layers.1.input_layernorm.weight"
    ].clone()


def without_query_scale(weights: Weights, settings: Settings) -> None:
    settings["rope_parameters"]["llama_4_scaling_beta"] = 0.0


def rope_factor(weights: Weights, settings: Settings) -> None:
    settings["rope_parameters"]["factor"] /= 2


def rope_theta(weights: Weights, settings: Settings) -> None:
    settings["rope_parameters"]["rope_theta"] *= 1.01


LONG = {"max_position_embeddings": 131072}
FAULTS: dict[str, tuple[str, Callable[[Weights, Settings], None]]] = {
    **{
        fault.__name__: ("ministral3", fault)
        for fault in (swapped_head, scaled_query, dropped_layer, wrong_norm, without_query_scale, rope_factor)
    },
    "rope_factor of Llama 3": ("llama3", rope_factor),
    "rope_theta": ("llama3", rope_theta),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    small.ministral3(folder / "ministral3", num_hidden_layers=4, dtype="bfloat16")
    small.llama3(folder / "llama3", num_hidden_layers=4, dtype="bfloat16", **LONG)
    for family in ("ministral3", "llama3"):
        assert main(["convert", "import", f"{folder}/{family}", f"{folder}/{family}-imported"]) == 0
    return folder


def verified(imported: Path, family: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code, and whether the table calls the AR logits equal."""
    capsys.readouterr()
    code = main(["convert", "verify", str(directory), f"{imported}/{family}-imported"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "AR logits" in line and "│" in line]
    return code, row.split("│")[4].strip()


@pytest.mark.parametrize("family", ["ministral3", "llama3"])
def test_bf16_weights_are_compared_in_fp32(imported: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(imported, family, imported / family, capsys) == (0, "yes")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_exceeds_the_limit_of_the_logits(
    imported: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family, plant = FAULTS[fault]
    for file in (imported / family).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, settings = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    plant(weights, settings)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert verified(imported, family, tmp_path, capsys) == (1, "no")


def test_another_dtype_of_the_same_numbers_is_named(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = imported / "llama3"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({name: t.float() for name, t in small.weights(source).items()}, tmp_path / "model.safetensors")
    assert main(["convert", "verify", str(source), str(tmp_path)]) == 1
    assert "stored as torch.bfloat16 and torch.float32" in capsys.readouterr().out


def test_layers_of_transformers_are_read_one_at_a_time(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two layers are in memory at once, so that a model of any size is compared."""
    from nemodiff_train.conversion import comparison, verify

    held: list[int] = []
    empty = comparison.empty_reference

    def watched(config: Any, **options: Any) -> Any:
        model = empty(config, **options)
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda *call: held.append(sum(p.numel() for p in model.parameters() if p.device.type == "cpu"))
            )
        return model

    monkeypatch.setattr(comparison, "empty_reference", watched)
    verify.start_model_parallel(1)
    side = verify._open_side(str(imported / "llama3"))
    logits = side.ar_logits(torch.arange(20, 60)[None], torch.arange(40)[None])
    assert logits.dtype == torch.float32 and held == [0, 0, 0, 0]
