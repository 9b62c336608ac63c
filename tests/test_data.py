"""Data preparation end to end: every reader, resuming, every refusal, and reading with Megatron."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemodiff_train.cli import main
from nemodiff_train.data import encode, parts, prepare
from nemodiff_train.data.manifest import Manifest, check_blend, sha256_of, tokenizer_fingerprint
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.demo.corpus import write_stdlib_text
from nemodiff_train.errors import UserError

TEXTS = [f"def f{n}(x):\n    return x * {n}  # caf\u00e9 \u2028 {'long ' * (n % 7)}\n" for n in range(300)]
SUFFIXES = (".bin", ".idx", ".counts.npy", ".json")


def save_tokenizer(folder: Path, vocab_size: int, eos: bool = True) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<mask>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    names = {"eos_token": "<eos>"} if eos else {}
    PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", **names).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "a.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, jsonl: Path, tokenizer_dir: str) -> str:
    """An uninterrupted run of one worker."""
    prefix = str(tmp_path_factory.mktemp("output") / "data.v1")
    assert run(jsonl, tokenizer_dir, prefix) == 0
    return prefix


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run(source: object, tokenizer: str, prefix: object, *options: str) -> int:
    words = ["data", "prepare", str(source), "--tokenizer", tokenizer, "--output", str(prefix)]
    return main([*words, "--workers", "1", *options])


def read_back(prefix: object, tokenizer_dir: str) -> list[str]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_tokenizer(tokenizer_dir)
    documents = [document.tolist() for document in IndexedDataset(str(prefix))]
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def digests(prefix: object) -> dict[str, str]:
    return {suffix: sha256_of(Path(f"{prefix}{suffix}")) for suffix in SUFFIXES}


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
    assert not Path(f"{prepared}.parts").exists()


def test_workers_do_not_change_the_result(
    prepared: str, jsonl: Path, tokenizer_dir: str, tmp_path: Path
) -> None:
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
    pyarrow.parquet.write_table(
        pyarrow.table({"n": [1, 2, 3], "body": ["one", None, "two"]}), folder / "c.parquet"
    )
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
    """In a process of its own: small parts, and slow enough to be killed between two of them."""
    original = prepare.documents

    def documents(sources: Any) -> Iterator[str]:
        for text in original(sources):
            time.sleep(0.003)
            yield text

    parts.PART_BYTES, encode.BATCH_DOCUMENTS, prepare.documents = 1000, 8, documents
    run(source, tokenizer, prefix)


def test_killed_and_resumed(
    prepared: str, jsonl: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out"
    child = multiprocessing.get_context("fork").Process(target=slow_run, args=(jsonl, tokenizer_dir, prefix))
    child.start()
    third = Path(f"{prefix}.parts/00003.bin")
    while not third.exists() and child.is_alive():
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
    replace, discard = Path.replace, parts.Parts.discard
    left = [moves + 1]  # the first is of state.json

    def stop_after(path: Path, target: Any) -> Path:
        if left[0] == 0:
            raise SystemError
        left[0] -= 1
        return replace(path, target)

    def stop(self: parts.Parts) -> None:
        raise SystemError

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Path, "replace", stop_after)
        patch.setattr(parts.Parts, "discard", stop)
        run(jsonl, tokenizer_dir, tmp_path / "out")
    assert parts.Parts.discard is discard
    assert run(jsonl, tokenizer_dir, tmp_path / "out") == 0
    assert digests(tmp_path / "out") == digests(prepared)
    assert not (tmp_path / "out.parts").exists()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


BAD_INPUTS = {
    "missing": (None, "no such file or directory"),
    "empty.txt": (b"", "empty"),
    "blank.jsonl": (b"\n\n", "no documents"),
    "malformed.jsonl": (b'{"text": "a"}\n{"text": \n', "malformed.jsonl:2: malformed JSON"),
    "list.jsonl": (b"[1]\n", "list.jsonl:1: expected a JSON object"),
    "field.jsonl": (b'{"txt": "a", "id": 1}\n', "its fields: txt, id (--text-field). Did you mean 'txt'?"),
    "number.jsonl": (b'{"text": 3}\n', "of type int, not text"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    "binary.dat": (b"ab\xff\xfe", "not UTF-8 text at byte 2"),
    "broken.parquet": (b"PAR2", "not a Parquet file"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_refused_input(
    name: str, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD_INPUTS[name]
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tokenizer_dir, tmp_path / "out" / "data") == 2
    assert message in one_line(capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_refused_tokenizer_and_output(
    jsonl: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    without_eos = save_tokenizer(tmp_path / "without", 290, eos=False)
    output = tmp_path / "out"
    cases: list[tuple[str, Path, tuple[str, ...], str]] = [
        (str(tmp_path / "none"), output, (), "no such tokenizer directory"),
        (str(tmp_path / "empty"), output, (), "cannot load a tokenizer"),
        (without_eos, output, (), "name one with --eod-token"),
        (tokenizer_dir, output, ("--eod-token", "<end>"), "no such token"),
        (tokenizer_dir, output, ("--workers", "0"), "at least 1"),
        (tokenizer_dir, tmp_path / "empty", (), "a directory"),
        (tokenizer_dir, tmp_path / "file" / "out", (), "cannot write there"),
    ]
    for tokenizer, prefix, options, message in cases:
        assert run(jsonl, tokenizer, prefix, *options) == 2
        assert message in one_line(capsys)
    assert run(tmp_path / "empty", tokenizer_dir, output) == 2
    assert "no file in this directory" in one_line(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file", "without"}


def test_existing_output(
    jsonl: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [{"text": "one"}])
    prefix = tmp_path / "out"
    assert run(first, tokenizer_dir, prefix) == 0
    before = digests(prefix)
    capsys.readouterr()
    assert run(first, tokenizer_dir, prefix) == 0
    assert "already complete" in capsys.readouterr().err
    assert run(jsonl, tokenizer_dir, prefix) == 2
    assert "other inputs" in one_line(capsys)
    assert run(first, save_tokenizer(tmp_path / "other", 280), prefix) == 2
    assert "refusing to mix tokenizers" in one_line(capsys)
    assert digests(prefix) == before
    assert run(jsonl, tokenizer_dir, prefix, "--overwrite") == 0
    assert read_back(prefix, tokenizer_dir) == TEXTS
    capsys.readouterr()
    Path(f"{prefix}.json").unlink()
    assert run(jsonl, tokenizer_dir, prefix) == 2
    assert "has no manifest" in one_line(capsys)


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device; the same command continues"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
    ],
)
def test_failure_keeps_the_parts(
    failure: BaseException,
    code: int,
    message: str,
    jsonl: Path,
    tokenizer_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise failure

    monkeypatch.setattr(parts.Parts, "publish", fail)
    assert run(jsonl, tokenizer_dir, tmp_path / "out") == code
    assert message in one_line(capsys)
    state = tmp_path / "out.parts" / "state.json"
    assert json.loads(state.read_bytes())["parts"][0]["documents"] == len(TEXTS)
    state.write_text("{")
    assert run(jsonl, tokenizer_dir, tmp_path / "out") == 2
    assert "state.json: damaged" in one_line(capsys)


def test_one_process_at_a_time(
    jsonl: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], prepared: str
) -> None:
    manifest = Manifest.read(prepared)
    assert manifest is not None
    with parts.Parts(str(tmp_path / "out"), manifest).locked():
        assert run(jsonl, tokenizer_dir, tmp_path / "out") == 2
        assert "another process" in one_line(capsys)


def test_inspect(prepared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", prepared, "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "300" in shown and "verified" in shown and "def f2(x)" in shown
    copy = str(tmp_path / "copy")
    for suffix in SUFFIXES:
        Path(copy + suffix).write_bytes(Path(prepared + suffix).read_bytes())
    Path(f"{copy}.bin").write_bytes(Path(f"{prepared}.bin").read_bytes()[::-1])
    assert main(["data", "inspect", copy, "--verify"]) == 2
    assert "copy.bin: its SHA-256" in one_line(capsys)
    Path(f"{copy}.json").write_text("{}")
    assert main(["data", "inspect", copy]) == 2
    assert "not a data manifest" in one_line(capsys)
    assert main(["data", "inspect", str(tmp_path / "none")]) == 2
    assert "no such manifest" in one_line(capsys)


def test_fingerprint(tokenizer_dir: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer("a b", truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(tokenizer) == expected
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "again"))) == expected
    assert tokenizer_fingerprint(load_tokenizer(save_tokenizer(tmp_path / "other", 280))) != expected


def test_check_blend(prepared: str, tokenizer_dir: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    mask = tokenizer.mask_token_id
    check_blend([prepared, prepared], tokenizer, mask)
    bare = str(tmp_path / "bare")
    for suffix in (".bin", ".idx"):
        Path(bare + suffix).write_bytes(Path(prepared + suffix).read_bytes())
    check_blend([bare], tokenizer, mask)
    masked = write_jsonl(tmp_path / "masked.jsonl", [{"text": "a <mask> b <mask>"}])
    assert run(masked, tokenizer_dir, tmp_path / "masked") == 0
    assert run(masked, tokenizer_dir, tmp_path / "ended", "--eod-token", "!") == 0
    smaller = load_tokenizer(save_tokenizer(tmp_path / "other", 280))
    (tmp_path / "empty.bin").touch()
    (tmp_path / "empty.idx").touch()
    cases: list[tuple[list[str], Any, int, str]] = [
        ([str(tmp_path / "none")], tokenizer, mask, "none.bin: no such file"),
        ([str(tmp_path / "empty")], tokenizer, mask, "is empty"),
        ([], tokenizer, mask, "no training data"),
        ([prepared], tokenizer, 300, "outside the tokenizer's ids 0..299"),
        ([prepared], tokenizer, -1, "outside"),
        ([prepared], smaller, mask, "prepared with another tokenizer"),
        ([bare], smaller, mask, "beyond the tokenizer's 280"),
        ([prepared, str(tmp_path / "masked")], tokenizer, mask, "occurs 2 times as text"),
        ([bare], tokenizer, tokenizer.convert_tokens_to_ids("x"), "('x') occurs"),
        ([prepared, str(tmp_path / "ended")], tokenizer, 250, "end documents differently"),
    ]
    for prefixes, given, token, message in cases:
        with pytest.raises(UserError) as refusal:
            check_blend(prefixes, given, token)
        assert message in str(refusal.value)
    Path(f"{bare}.json").write_bytes(Path(f"{prepared}.json").read_bytes())
    Path(f"{bare}.bin").write_bytes(Path(f"{prepared}.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="do not hold the manifest's"):
        check_blend([bare], tokenizer, mask)


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
