"""Machines with Transformer Engine, Apex, both or neither train one model, and go on from each other's checkpoints.

Neither is installed here: ``tests/doubles`` behaves as they do towards Megatron-Core and Bridge, which take all the
branches that they take with the real ones.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.errors import UserError
from tests import jobs, small
from tools.support.layouts import FULL_RECOMPUTE, PP2, SHARDED, SP2
from tools.support.ranks import RankPool

DOUBLES = Path(__file__).parent / "doubles"
SETTINGS = ["train.train_iters=4", "train.micro_batch_size=4", "checkpoint.save_interval=0"]
SAVED = [*SHARDED, "checkpoint.save_interval=2", "checkpoint.dist_ckpt_optim_fully_reshardable=true"]
"""The last of them lets machines with other layers go on."""
TOLERANCE = {"fp32": 1e-5, "bf16_mixed": 1e-2}
"""Relative, of losses whose sums are in another order."""
FP8 = "bf16_with_fp8_delayed_scaling_mixed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.run_inputs(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """A process that finds Transformer Engine."""
    with RankPool(tmp_path_factory.mktemp("engine"), [DOUBLES / "te", DOUBLES / "common"]) as pool:
        yield pool


@pytest.fixture(scope="module")
def apex(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """A process that finds Apex."""
    with RankPool(tmp_path_factory.mktemp("apex"), [DOUBLES / "apex", DOUBLES / "common"]) as pool:
        yield pool


def run(output: str, settings: list[str], source: str = "model", **arguments: Any) -> list[float]:
    """Train in the folder of the inputs; return the losses."""
    start = {"start_from": str(Path(output).parent / source), "data": str(Path(output).parent / "data")}
    return losses(jobs.train(output=output, settings=[*SETTINGS, *settings], **start, **arguments))


def losses(found: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in found["steps"]]


def continued(output: str, stopped: str, precision: str) -> list[float]:
    """Go on with a run after two steps; return the losses of the others."""
    start = {"start_from": str(Path(output).parent / "model"), "data": str(Path(output).parent / "data")}
    settings = [*SETTINGS, *SHARDED, f"mixed_precision={precision}"]
    return losses(jobs.resume(output, str(Path(output).parent / stopped), 2, settings=settings, **start))


def start(folder: str, host: str) -> dict[str, Any]:
    """Train in fp32 with a checkpoint half way and in bf16, and ask for FP8; return losses, and the refusal."""
    if host == "both":
        add_apex()
    words = {"fp32": SAVED, "bf16_mixed": SAVED[:-1]}
    found: dict[str, Any] = {
        precision: run(f"{folder}/{host}-{precision}", [*settings, f"mixed_precision={precision}"])
        for precision, settings in words.items()
    }
    try:
        run(f"{folder}/{host}-fp8", [f"mixed_precision={FP8}"])
    except UserError as error:
        found["refused"] = str(error)
    return found


def add_apex() -> None:
    """Let this process find Apex's extension for gradients beside Transformer Engine."""
    from megatron.core.tensor_parallel import layers

    sys.path.append(str(DOUBLES / "apex"))
    extension = importlib.import_module("fused_weight_gradient_mlp_cuda")
    vars(layers).update(fused_weight_gradient_mlp_cuda=extension, _grad_accum_fusion_available=True)


@pytest.fixture(scope="module")
def started(folder: Path, ranks: RankPool, engine: RankPool, apex: RankPool) -> dict[str, Any]:
    hosts = {"none": ranks, "te": engine, "apex": apex, "both": engine}
    return {
        host: pool.call(f"start-{host}", 1, start, logs=folder / "logs", folder=str(folder), host=host)
        for host, pool in hosts.items()
    }


def test_every_machine_starts_or_says_why_not(started: dict[str, Any]) -> None:
    for host, found in started.items():
        assert "fp8 needs Transformer Engine and a GPU" in found["refused"], host
        for precision, tolerance in TOLERANCE.items():
            assert found[precision] == pytest.approx(started["none"][precision], rel=tolerance), (host, precision)


def rotate(folder: str) -> dict[str, list[float] | int]:
    """Train on text and on documents kept apart; return the losses, and how often the kernel for angles ran."""
    sizes = sys.modules["transformer_engine"].sizes
    found: dict[str, list[float] | int] = {}
    apart = ["dataset.reset_attention_mask=true", "dataset.reset_position_ids=true"]
    for name, settings in {"text": [], "documents": apart}.items():
        sizes.clear()
        found[name] = run(f"{folder}/te-rotated-{name}", [*settings, "mixed_precision=fp32"])
        found[f"{name}, calls"] = len(sizes)
    return found


def test_angles_are_fused_where_rows_agree(folder: Path, started: dict[str, Any], engine: RankPool) -> None:
    found = engine.call("rotate", 1, rotate, logs=folder / "logs", folder=str(folder))
    assert found["text"] == pytest.approx(started["none"]["fp32"], rel=1e-5)
    # Queries and keys of two layers in two micro-batches of four steps.
    assert (found["text, calls"], found["documents, calls"]) == (2 * 2 * 2 * 4, 0)


def exchange(folder: str, host: str, stopped: list[str], refused: str) -> dict[str, Any]:
    """Go on with the runs of machines; return the losses, and what is said of one that was saved for its layers."""
    found: dict[str, Any] = {name: continued(f"{folder}/{host}-{name}", f"{name}-fp32", "fp32") for name in stopped}
    try:
        continued(f"{folder}/{host}-refused", f"{refused}-bf16_mixed", "bf16_mixed")
    except UserError as error:
        found["refused"] = str(error)
    return found


def test_every_machine_goes_on_where_another_stopped(
    folder: Path, started: dict[str, Any], ranks: RankPool, engine: RankPool, apex: RankPool
) -> None:
    """Weights, and the optimizer's state with its step; an order of parameters that is not its own is refused."""
    pools = {"none": ranks, "te": engine, "apex": apex}
    for host, stopped, refused in (
        ("none", ["te", "apex"], "te"),
        ("te", ["none", "te"], "none"),
        ("apex", ["te", "apex"], "te"),
    ):
        words = {"folder": str(folder), "host": host, "stopped": stopped, "refused": refused}
        found = pools[host].call(f"exchange-{host}", 1, exchange, logs=folder / "logs", **words)
        assert "model.transformer_impl is now" in found.pop("refused"), host
        for other, those in found.items():
            assert those == pytest.approx(started["none"]["fp32"][2:], rel=1e-5), (host, other)


@pytest.mark.parametrize(("host", "world", "layout"), [("te", 4, [*SP2, *PP2]), ("apex", 2, PP2)])
def test_every_machine_lays_a_model_out(
    folder: Path, started: dict[str, Any], engine: RankPool, apex: RankPool, host: str, world: int, layout: list[str]
) -> None:
    """In fp32, where no recipe for precision names the format in which stages exchange activations."""
    words = {"output": str(folder / f"{host}-parts"), "settings": [*layout, "mixed_precision=fp32"]}
    found = {"te": engine, "apex": apex}[host].call(f"parts-{host}", world, run, logs=folder / "logs", **words)
    assert found == pytest.approx(started["none"]["fp32"], rel=1e-5)


def test_conversion_with_layers_of_transformer_engine(folder: Path, engine: RankPool) -> None:
    imported, model = str(folder / "te-imported"), str(folder / "model")
    commands = [
        ["import", model, imported, "--mask-token", small.MASK],
        ["verify", imported, model],
        ["export", imported, str(folder / "te-exported"), "--format", "ar"],
        ["verify", str(folder / "te-exported"), model],
    ]
    assert engine.call("convert", 1, jobs.convert, logs=folder / "logs", commands=commands)["codes"] == [0] * 4


def recompute(folder: str) -> dict[str, list[float]]:
    """Train with all activations kept, and with none."""
    kept = ["model.recompute_elementwise=false"]
    return {"kept": run(f"{folder}/te-all-kept", kept), "none": run(f"{folder}/te-nothing-kept", FULL_RECOMPUTE)}


def test_recomputation_with_layers_of_transformer_engine(
    folder: Path, started: dict[str, Any], engine: RankPool
) -> None:
    found = engine.call("recompute", 1, recompute, logs=folder / "logs", folder=str(folder))
    for losses in found.values():
        assert losses == started["te"]["fp32"]


def keep() -> float:
    """Return the bytes that a layer keeps over those planned for a GPU and one more copy of attention's output."""
    from nemodiff_train.planning.layouts import Layout
    from nemodiff_train.planning.memory import _saved_by_layer
    from tests.test_plan import _kept_by_a_step, workload

    sizes = {**small.sizes(128), "intermediate_size": 384, "head_dim": 32}
    kept = [_kept_by_a_step({**sizes, "num_hidden_layers": layers}, recompute=True) for layers in (4, 2)]
    heads, keys = sizes["num_attention_heads"] * 32, sizes["num_key_value_heads"] * 32
    work = workload(hidden=128, query_channels=heads, key_channels=keys, feed_forward=384, length=256)
    saved = _saved_by_layer(work, Layout(1, 1, 1, 1, 1, False), "cuda")
    planned = saved + work.positions * heads * work.bytes_per_element
    return (kept[0] - kept[1]) / 2 / planned


def test_what_a_layer_of_transformer_engine_keeps_is_as_planned(folder: Path, engine: RankPool) -> None:
    """Its linear layers keep what their norms put out."""
    assert engine.call("keep", 1, keep, logs=folder / "logs") == pytest.approx(1, rel=0.05)


def adapt(folder: str, host: str) -> list[float]:
    """Train LoRA on what was trained without Transformer Engine; return the losses."""
    from nemodiff_train.config.overrides import override
    from nemodiff_train.model.adapters import lora
    from nemodiff_train.training.run import train

    output = f"{folder}/{host}-lora"
    config = small.recipe(f"{folder}/none-fp32/checkpoints", f"{folder}/data", output)
    config.peft = lora(8)
    settings = [*SETTINGS, *SP2, "checkpoint.save_interval=4"]
    train(override(config, dict(word.split("=", 1) for word in settings)))
    return [json.loads(line)["loss"] for line in Path(output, "metrics.jsonl").read_text().splitlines()]


def test_lora_with_layers_of_transformer_engine(
    folder: Path, started: dict[str, Any], ranks: RankPool, engine: RankPool
) -> None:
    """Under sequence parallelism, where the adapter takes the norm's output from the layer."""
    words = {"logs": folder / "logs", "folder": str(folder)}
    expected = ranks.call("lora", 2, adapt, host="none", **words)
    assert engine.call("lora-te", 2, adapt, host="te", **words) == pytest.approx(expected, rel=1e-4)
    checkpoint = {"logs": folder / "logs", "checkpoint": str(folder / "te-lora" / "checkpoints")}
    decoded = engine.call("decode", 1, jobs.decode, **checkpoint)
    assert decoded["linear"] == decoded["ar"]
    assert ranks.call("decode-te", 1, jobs.decode, **checkpoint) == decoded


def quantize(folder: str) -> dict[str, Any]:
    """Train in FP8 as on a GPU, stop half way and go on; return the losses and what the checkpoint decodes."""
    from nemodiff_train.runtime.start import Host
    from nemodiff_train.validation import kernels

    setattr(kernels, "init_runtime", lambda: Host(cuda=True, missing_packages=()))  # noqa: B010
    words = [*SAVED, f"mixed_precision={FP8}"]
    found = {"losses": run(f"{folder}/te-fp8", words), "again": continued(f"{folder}/te-fp8-again", "te-fp8", FP8)}
    return {**found, "decoded": jobs.decode(f"{folder}/te-fp8/checkpoints")}


def test_fp8_is_trained_saved_and_decoded_without(folder: Path, started: dict[str, Any], engine: RankPool) -> None:
    found = engine.call("fp8", 1, quantize, logs=folder / "logs", folder=str(folder))
    assert found["losses"] != started["te"]["bf16_mixed"]
    assert found["losses"] == pytest.approx(started["te"]["bf16_mixed"], rel=5e-2)
    assert found["again"] == pytest.approx(found["losses"][2:], rel=1e-3)
    assert found["decoded"]["linear"] == found["decoded"]["ar"]
