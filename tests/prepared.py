"""Shared by the tests of data preparation: a tiny real tokenizer, inputs, and reading results back."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from nemodiff_train.cli import main
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.demo.tokenizer import byte_level_bpe
from nemodiff_train.files import sha256_of

TEXTS = [f"def f{n}(x):\n    return x * {n}  # caf\u00e9 \u2028 {'long ' * (n % 7)}\n" for n in range(300)]
SUFFIXES = (".bin", ".idx", ".counts.npy", ".json")


def save_tokenizer(folder: Path, vocab_size: int, eos: bool = True) -> str:
    inner = byte_level_bpe(TEXTS, vocab_size, ["<eos>", "<mask>"])
    names = {"eos_token": "<eos>"} if eos else {}
    PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="<mask>", **names).save_pretrained(folder)
    return str(folder)


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


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
