"""Data preparation end to end: every reader, resuming, and reading with Megatron."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemodiff_train.cli import main
from nemodiff_train.data import encode, partial_output, prepare
from nemodiff_train.data.manifest import Manifest
from nemodiff_train.data.partial_output import PartialOutput
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.demo.corpus import write_stdlib_text
from tests.prepared import SUFFIXES, TEXTS, digests, one_line, read_back, run, write_jsonl


def test_round_trip_and_manifest(prepared: str, tokenizer_dir: str, jsonl: Path) -> None:
    assert read_back(prepared, tokenizer_dir) == TEXTS
    manifest = Manifest.read(prepared)
    assert manifest is not None
    counts = np.load(f"{prepared}.counts.npy")
    assert manifest.documents == len(TEXTS) == counts[manifest.eod_token_id]
    assert manifest.tokens == counts.sum() == Path(f"{prepared}.bin").stat().st_size // 2
    assert manifest.bytes == sum(len(text.encode()) for text in TEXTS)
    assert (manifest.dtype, counts.dtype, counts.shape) == ("uint16", np.int64, (300,))
    assert manifest.bin_sha256 == digests(prepared)[".bin"]
    assert manifest.inputs[0].bytes == jsonl.stat().st_size
    assert not Path(f"{prepared}.partial").exists()


def test_workers_do_not_change_the_result(prepared: str, jsonl: Path, tokenizer_dir: str, tmp_path: Path) -> None:
    assert run(jsonl, tokenizer_dir, tmp_path / "two", "--workers", "2") == 0
    assert digests(tmp_path / "two") == digests(prepared)


def test_text_parquet_and_directory(tokenizer_dir: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "a.py").write_bytes(b"x = 1\r\n")
    (folder / "b.txt").write_text("")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": ["one", None, "two"]}), folder / "c.parquet")
    write_jsonl(folder / "sub" / "d.jsonl", [{"body": "three", "meta": 1}, {"body": "four", "meta": "m"}])
    assert run(folder, tokenizer_dir, tmp_path / "all", "--text-field", "body") == 0
    assert read_back(tmp_path / "all", tokenizer_dir) == ["x = 1\r\n", "one", "two", "three", "four"]
    assert run(folder, tokenizer_dir, tmp_path / "some", "--glob", "*.py", "--eod-token", "<eos>") == 0
    assert read_back(tmp_path / "some", tokenizer_dir) == ["x = 1\r\n"]


def test_saved_data_set(tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"]})}).save_to_disk(str(tmp_path / "saved"))
    assert run(tmp_path / "saved", tokenizer_dir, tmp_path / "out") == 0
    assert read_back(tmp_path / "out", tokenizer_dir) == ["a", "b"]
    capsys.readouterr()
    assert run(tmp_path / "saved", tokenizer_dir, tmp_path / "no", "--split", "trian") == 2
    assert "Did you mean 'train'" in one_line(capsys)


def test_hub_data_set(tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def load_dataset(name: str, config: str, **options: object) -> Any:
        assert (name, config) == ("owner/name", "small")
        assert options == {"split": "train", "revision": "c0ffee", "streaming": True}
        return datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()

    class Api:
        def dataset_info(self, name: str) -> Any:
            return huggingface_hub.hf_api.DatasetInfo(id=name, sha="c0ffee", tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert run("owner/name:small", tokenizer_dir, tmp_path / "out") == 0
    assert read_back(tmp_path / "out", tokenizer_dir) == ["a", "b"]


def slow_run(source: Path, tokenizer: str, prefix: Path) -> None:
    """In a process of its own: small chunks, and slow enough to be killed between two of them."""
    original = prepare.documents

    def documents(sources: Any) -> Iterator[str]:
        for text in original(sources):
            time.sleep(0.003)
            yield text

    partial_output.CHUNK_BYTES, encode.BATCH_DOCUMENTS, prepare.documents = 1000, 8, documents
    run(source, tokenizer, prefix)


def test_killed_and_resumed(
    prepared: str, jsonl: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out"
    # Spawned: a fork of a process that has run Megatron would inherit locks that its threads hold.
    child = multiprocessing.get_context("spawn").Process(target=slow_run, args=(jsonl, tokenizer_dir, prefix))
    child.start()
    third = Path(f"{prefix}.partial/00003.bin")
    deadline = time.monotonic() + 300
    while not third.exists() and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not any(Path(f"{prefix}{suffix}").exists() for suffix in SUFFIXES)

    capsys.readouterr()
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "other"}])
    assert run(other, tokenizer_dir, prefix) == 2
    assert "interrupted run with other inputs" in one_line(capsys)
    assert run(jsonl, tokenizer_dir, prefix) == 0
    assert "continuing after" in capsys.readouterr().err
    assert digests(prefix) == digests(prepared)
    assert not third.parent.exists()


@pytest.mark.parametrize("moves", [1, 3, 4])
def test_interrupted_while_publishing(
    moves: int,
    prepared: str,
    jsonl: Path,
    tokenizer_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace, discard = Path.replace, PartialOutput.discard
    left = [moves + 1]  # the first is of state.json

    def stop_after(path: Path, target: Any) -> Path:
        if left[0] == 0:
            raise SystemError
        left[0] -= 1
        return replace(path, target)

    def stop(self: PartialOutput) -> None:
        raise SystemError

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Path, "replace", stop_after)
        patch.setattr(PartialOutput, "discard", stop)
        run(jsonl, tokenizer_dir, tmp_path / "out")
    assert PartialOutput.discard is discard
    assert run(jsonl, tokenizer_dir, tmp_path / "out") == 0
    assert digests(tmp_path / "out") == digests(prepared)
    assert not (tmp_path / "out.partial").exists()


def test_merged_is_as_prepared_at_once(
    prepared: str, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = []
    for number, first in enumerate((0, 100, 250)):
        texts = TEXTS[first : (100, 250, 300)[number]]
        source = write_jsonl(tmp_path / f"{number}.jsonl", [{"text": text} for text in texts])
        shards.append(str(tmp_path / f"shard-{number}"))
        assert run(source, tokenizer_dir, shards[-1]) == 0
    output = str(tmp_path / "merged")
    assert main(["data", "merge", *shards, "--output", output]) == 0
    assert digests(output) | {".json": ""} == digests(prepared) | {".json": ""}
    manifest = Manifest.read(output)
    assert manifest is not None
    assert (manifest.documents, [Path(each.path).name for each in manifest.inputs]) == (
        len(TEXTS),
        ["0.jsonl", "1.jsonl", "2.jsonl"],
    )
    assert not Path(f"{output}.partial").exists()
    capsys.readouterr()
    assert main(["data", "merge", *shards, "--output", output]) == 0
    assert "already complete" in capsys.readouterr().err
    assert main(["data", "merge", *shards[:2], "--output", output]) == 2
    assert "other inputs" in one_line(capsys)
    assert main(["data", "merge", *shards[:2], "--output", output, "--overwrite"]) == 0
    assert read_back(output, tokenizer_dir) == TEXTS[:250]


@pytest.mark.parametrize("moves", [1, 3])
def test_merge_interrupted_while_publishing(
    moves: int, prepared: str, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = Path.replace, [moves + 1]  # the first is of state.json

    def stop_after(path: Path, target: Any) -> Path:
        if left[0] == 0:
            raise SystemError
        left[0] -= 1
        return replace(path, target)

    command = ["data", "merge", prepared, "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Path, "replace", stop_after)
        main(command)
    assert main(command) == 0
    assert digests(tmp_path / "out") | {".json": ""} == digests(prepared) | {".json": ""}
    assert not (tmp_path / "out.partial").exists()


def test_megatron_reads_it(prepared: str, tokenizer_dir: str, tmp_path: Path) -> None:
    """Megatron's own GPT data set, in one process, without torch.distributed."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.eod, tokenizer.unique_identifiers = tokenizer.eos_token_id, {"class": "test"}
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(tmp_path),
    )
    indexed = IndexedDataset(prepared)
    everything = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(indexed, prepared, everything, 10, Split.train, config)
    sample = dataset[0]
    assert sample["tokens"].shape == (32,)
    assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()


def test_stdlib_corpus(tokenizer_dir: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    assert 50_000 < write_stdlib_text(first, 60_000) <= 60_000
    write_stdlib_text(second, 60_000)
    assert first.read_bytes() == second.read_bytes()
    assert run(first, tokenizer_dir, tmp_path / "out") == 0
