"""Every value of every file from outside, replaced by hostile ones: read, or refused in one line, and quickly.

Of the large files every run tries the same part; ``NEMODIFF_HOSTILE=1`` tries all.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nemodiff_train.errors import UserError
from tests import small
from tests.fuzz_targets import _limits
from tests.hostile import variants

ALL = bool(os.environ.get("NEMODIFF_HOSTILE"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file of each kind."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.data.manifest import InputInfo, Manifest, TokenizerInfo

    made = tmp_path_factory.mktemp("hostile")
    for name in ("qwen3", "nemotron", "llama3", "ministral3_vision"):
        getattr(small, name)(made / name)
    small.tokenizer(made / "tokenizer")
    _checkpoint(made)
    small.data(made / "data", documents=3)
    tokens = (made / "data.bin").stat().st_size // 2
    manifest = Manifest(
        tokenizer=TokenizerInfo(name="t", vocab_size=320, fingerprint="f"),
        eod_token_id=0,
        text_field="text",
        inputs=[InputInfo(path="a", split=None, files=1, bytes=1, version="v")],
        documents=3,
        tokens=tokens,
        bytes=tokens,
        dtype="uint16",
        bin_sha256="0",
        idx_sha256="0",
    )
    (made / "data.json").write_text(manifest.model_dump_json())
    return made


def _checkpoint(made: Path) -> None:
    """Write the configuration of a checkpoint as a run saves it; it needs no weights to be looked at."""
    from nemodiff_train.model.checksums import write_checksums

    config = small.recipe(str(made / "qwen3"), "data", str(made / "run"))
    sections = {name: section for name, section in config.to_dict().items() if name in ("optimizer", "checkpoint")}
    sections |= {
        "model": config.to_dict()["model"],
        "train": {"global_batch_size": 8},
        "requested_settings": {"optimizer.lr": 1},
    }
    sections["adapter_base"] = {"iteration": "iter_0000000", "checksum": "0"}
    from megatron.bridge.utils.yaml_utils import safe_yaml_representers

    (made / "saved" / "iter_0000001").mkdir(parents=True)
    with safe_yaml_representers():
        (made / "saved" / "iter_0000001" / "run_config.yaml").write_text(yaml.safe_dump(sections))
    shutil.copytree(made / "saved", made / "summed")
    write_checksums(made / "summed" / "iter_0000001")


def sweep(
    file: Path, tree: Any, read: Callable[[], object], write: Callable[[Any], str] = json.dumps, every: int = 1
) -> list[str]:
    """Read a file with each hostile variant of its content; return the names of those that were accepted."""
    before, accepted = file.read_bytes(), []
    try:
        for name, variant in islice(variants(tree), 0, None, 1 if ALL else every):
            file.write_text(write(variant))
            try:
                with _limits():
                    read()
                accepted.append(name)
            except UserError as error:
                assert len(str(error).splitlines()) == 1
            except Exception as error:
                raise AssertionError(f"{file.name}: {name}") from error
    finally:
        file.write_bytes(before)
    return accepted


def absurd(accepted: list[str], *keys: str) -> list[str]:
    """Return the accepted variants in which one of some sizes is no size."""
    nonsense = ("=-1", "=1.5", "=nan", "=inf", "='x'", "=[]", "={}", "=True", "=1000000000000000000")
    return [name for name in accepted if name.rpartition("=")[0] in keys and name.endswith(nonsense)]


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "block_size", "rms_norm_eps",
)  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "nemotron", "llama3", "ministral3_vision"])
def test_config_json(folder: Path, family: str) -> None:
    from nemodiff_train.conversion.weights import check_weights
    from nemodiff_train.model.hf_directory import HFDirectory
    from nemodiff_train.model.pretrained import model_from

    def read() -> None:
        model_from(str(folder / family))
        check_weights(HFDirectory(folder / family))

    file = folder / family / "config.json"
    content = json.loads(file.read_text())
    content = {key: value for key, value in content.items() if key not in ("vision_config", "layer_types")}
    accepted = sweep(file, content, read, every=11)
    assert absurd(accepted, *SIZES, *(f"text_config.{key}" for key in SIZES)) == []


def test_more_layers_than_weights_are_refused_before_they_are_built(folder: Path) -> None:
    from nemodiff_train.conversion.weights import check_weights
    from nemodiff_train.model.hf_directory import HFDirectory

    file = folder / "qwen3" / "config.json"
    before = file.read_text()
    try:
        for layers in (9999, 3_000_000):
            settings = {**json.loads(before), "num_hidden_layers": layers}
            settings.pop("layer_types", None)
            file.write_text(json.dumps(settings))
            with pytest.raises(UserError, match="num_hidden_layers"):
                check_weights(HFDirectory(folder / "qwen3"))
    finally:
        file.write_text(before)


def test_run_config(folder: Path) -> None:
    from nemodiff_train.model.checkpoint import Checkpoint
    from nemodiff_train.model.pretrained import model_from

    file = folder / "saved" / "iter_0000001" / "run_config.yaml"
    sections = yaml.safe_load(file.read_text())
    read_of_model = (
        "_target_", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size", "block_size",
        "mask_token_id", "rope_parameters", "hf_generation_config", "attention_options", "bf16", "params_dtype",
    )  # fmt: skip
    model = {key: value for key, value in sections["model"].items() if key in read_of_model}
    few = {**sections, "model": model, "optimizer": {"use_distributed_optimizer": False, "lr": 1.0}}
    few["checkpoint"] = {"dist_ckpt_optim_fully_reshardable": True, "pretrained_checkpoint": "x"}
    accepted = sweep(
        file,
        few,
        lambda: model_from(Checkpoint.open(folder / "saved")),
        lambda tree: yaml.safe_dump({**tree, "model": _merged(sections["model"], tree.get("model"), read_of_model)}),
        every=11,
    )
    assert absurd(accepted, *(f"model.{key}" for key in ("num_layers", "hidden_size", "block_size"))) == []


def _merged(whole: dict[str, Any], part: object, names: tuple[str, ...]) -> object:
    """Return the model's section with some of its keys replaced, those that are missing included."""
    rest = {key: value for key, value in whole.items() if key not in names}
    return {**rest, **part} if isinstance(part, dict) else part


def test_checksums(folder: Path) -> None:
    from nemodiff_train.model.checkpoint import Checkpoint

    file = folder / "summed" / "iter_0000001" / "checksums.json"
    sweep(file, json.loads(file.read_text()), lambda: Checkpoint.open(folder / "summed").verify_contents())


def test_manifest_and_counts(folder: Path) -> None:
    from nemodiff_train.data.manifest import Manifest, read_counts

    prefix = str(folder / "data")
    manifest = Manifest.require(prefix)
    sweep(folder / "data.json", json.loads((folder / "data.json").read_text()), lambda: Manifest.require(prefix))
    counts = np.zeros(320, dtype=np.int64)
    counts[5] = manifest.tokens
    file = folder / "data.counts.npy"
    np.save(file, counts)
    assert read_counts(prefix, manifest)[5] == manifest.tokens
    negative = counts.copy()
    negative[:2] = 1, -1
    with file.open("rb") as whole:
        header = whole.read()
    others = [counts[:9], counts[None], counts.astype(float), negative, counts * 2, np.array([], np.int64)]
    for other in [*others, np.array([{}], dtype=object)]:
        np.save(file, other, allow_pickle=True)
        with pytest.raises(UserError, match=r"counts\.npy"):
            read_counts(prefix, manifest)
    long = header.replace(b"(320,)", b"(9999999999999,)").replace(b" " * 10 + b"\n", b"\n")
    for content in (b"", b"x", pickle.dumps(counts), header[:-9], header[:40], long):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"counts\.npy"):
            read_counts(prefix, manifest)
    file.unlink()


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("generation_config.json", {"eos_token_id": [2, 11], "bos_token_id": 1, "pad_token_id": 0}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": "model.safetensors"}}),
        ("tensor_checksums.json", {"lm_head.weight": "00000000"}),
    ],
)
def test_files_beside_a_model(folder: Path, name: str, tree: Any) -> None:
    from nemodiff_train.conversion.weights import check_contents, check_weights
    from nemodiff_train.model.hf_directory import HFDirectory
    from nemodiff_train.model.pretrained import model_from

    def read() -> None:
        model_from(str(folder / "qwen3"))
        check_weights(directory := HFDirectory(folder / "qwen3"))
        check_contents(directory)

    file = folder / "qwen3" / name
    there = file.is_file()
    before = file.read_bytes() if there else b""
    file.write_text("{}")
    try:
        accepted = sweep(file, tree, read)
    finally:
        file.write_bytes(before) if there else file.unlink()
    none = {"bos_token_id=-1", "eos_token_id.0=-1", "bos_token_id=[]"}  # how some say that there is none
    assert set(absurd(accepted, "eos_token_id.0", "bos_token_id")) <= none


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_tokenizers(folder: Path, name: str) -> None:
    from nemodiff_train.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    file = folder / "tokenizer" / name
    content = json.loads(file.read_text())
    if "model" in content:
        content["model"] |= {"vocab": {**content["model"]["vocab"]}, "merges": content["model"]["merges"][:1]}
        kept = list(content["model"]["vocab"].items())[:3]
        shown = {**content, "model": {**content["model"], "vocab": dict(kept)}}
        content = {**shown, "added_tokens": content["added_tokens"][:1]}
    sweep(file, content, lambda: tokenizer_fingerprint(load_tokenizer(str(folder / "tokenizer"))), every=7)


def test_logs_of_a_run(folder: Path) -> None:
    from nemodiff_train.resilience.gradient_guard import recorded_norms
    from nemodiff_train.resilience.restarts import record_start
    from nemodiff_train.training.callbacks.run_log import drop_after

    line, start = folder / "metrics.jsonl", {"step": 0, "time": 1.0, "ended": "x"}
    line.write_text("")

    def read_metrics() -> None:
        drop_after(line, 5)
        assert all(norm >= 0 for norm in recorded_norms(line, 9))

    sweep(line, {"step": 1, "grad_norm": 1.0}, read_metrics, lambda tree: json.dumps(tree) + "\n")
    restarts = folder / "restarts.json"
    restarts.write_text("[]")

    def read_restarts() -> None:
        with record_start(folder, 3):
            pass

    sweep(restarts, [start], read_restarts)
    deep = "[" * 100_000
    line.write_text(deep + "\n")
    restarts.write_text(deep)
    read_metrics()
    read_restarts()


def test_results_and_records(folder: Path) -> None:
    from nemodiff_train.conversion.automodel.card import _written, read_results
    from nemodiff_train.evaluation.records import LoggedRecord, read_jsonl

    file = folder / "metrics.json"
    results = {"task": "t", "modes": {"ar": {"accuracy": 0.5, "tpf_all": 1.0, "tpf_no_prefill": None}}}
    file.write_text("{}")

    def read() -> None:
        for figures in read_results(str(folder))["modes"].values():
            for name in ("accuracy", "tpf_all", "tpf_no_prefill"):
                _written(figures.get(name), name)

    sweep(file, results, read)
    decoded = {
        "prompt_index": 0,
        "tokens": [1],
        "forwards": {"prefill": 1},
        "cycles": [],
        "seconds": 1.0,
        "steps": [1],
    }
    record = {"mode": "ar", "settings": {}, "prompt": "a", "answer": "b", "text": "c", "correct": True}
    log = folder / "records.jsonl"
    log.write_text("")
    sweep(log, {**record, "decoded": decoded}, lambda: read_jsonl(log, LoggedRecord))


def test_adapters_of_an_exported_directory(folder: Path) -> None:
    """The code that goes with an export stands alone: its refusals are ValueErrors of one line."""
    from nemodiff_train.conversion.automodel.modeling_tri_mode import _adapter_size

    file = folder / "adapter_config.json"
    trees = (json.dumps(tree) for _, tree in variants({"r": 4, "lora_alpha": 8}))
    for content in ("", "{", "[1]", "[" * 100_000, *trees):
        file.write_text(content)
        try:
            rank, scale = _adapter_size(file)
            assert 0 < rank < 2**31 and 0 < scale < 2**31
        except ValueError as error:
            assert "adapter_config.json" in str(error) and len(str(error).splitlines()) == 1
    file.write_text('{"r": 4, "lora_alpha": 8}')
    assert _adapter_size(file) == (4, 2.0)
