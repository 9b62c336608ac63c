"""What data preparation and the checks before training refuse, and what they then leave behind."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.cli import main
from nemodiff_train.data.blend import check_blend
from nemodiff_train.data.partial_output import PartialOutput
from nemodiff_train.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nemodiff_train.data.tokenizer_files import copy_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.files import locked
from tests.prepared import SUFFIXES, TEXTS, digests, one_line, read_back, run, save_tokenizer, write_jsonl

BAD_INPUTS = {
    "missing": (None, "no such file or directory"),
    "empty.txt": (b"", "empty"),
    "blank.jsonl": (b"\n\n", "all records are empty or left out; check --text-field"),
    "malformed.jsonl": (b'{"text": "a"}\n{"text": \n', "malformed.jsonl:2: malformed JSON"),
    "list.jsonl": (b"[1]\n", "list.jsonl:1: expected a JSON object"),
    "field.jsonl": (b'{"txt": "a", "id": 1}\n', "its fields: txt, id (--text-field). Did you mean 'txt'?"),
    "number.jsonl": (b'{"text": 3}\n', "of type int, not text"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    "binary.dat": (b"ab\xff\xfe", "not UTF-8 text at byte 2"),
    "broken.parquet": (b"PAR2", "not a Parquet file"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_refused_input(name: str, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (str(tmp_path / "none"), output, (), "no such directory; give a directory with tokenizer files"),
        (str(tmp_path / "empty"), output, (), "cannot load a tokenizer"),
        (without_eos, output, (), "name one with --eod-token"),
        (tokenizer_dir, output, ("--eod-token", "<end>"), "no such token"),
        (tokenizer_dir, output, ("--workers", "0"), "at least 1"),
        (tokenizer_dir, tmp_path / "empty", (), "a directory"),
        (tokenizer_dir, tmp_path / "file" / "out", (), f"'{tmp_path / 'file'}' is a file"),
    ]
    for tokenizer, prefix, options, message in cases:
        assert run(jsonl, tokenizer, prefix, *options) == 2
        assert message in one_line(capsys)
    assert run(tmp_path / "empty", tokenizer_dir, output) == 2
    assert "no file in this directory" in one_line(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file", "without"}


def test_existing_output(jsonl: Path, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_failure_keeps_the_chunks(
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

    monkeypatch.setattr(PartialOutput, "publish", fail)
    assert run(jsonl, tokenizer_dir, tmp_path / "out") == code
    assert message in one_line(capsys)
    state = tmp_path / "out.partial" / "state.json"
    stored = json.loads(state.read_bytes())
    assert stored["chunks"][0]["size"]["documents"] == len(TEXTS)
    for damaged in ("{", "[1]", "[" * 100_000, json.dumps({**stored, "chunks": [{"stem": 1}]})):
        state.write_text(damaged)
        assert run(jsonl, tokenizer_dir, tmp_path / "out") == 2
        assert f"'{state}': " in (line := one_line(capsys)) and f"remove the directory {state.parent}" in line
    whole = {path: path.read_bytes() for path in (tmp_path / "out.partial").glob("00000.*")}
    for change in ({"stem": "../00000"}, {"size": {**stored["chunks"][0]["size"], "tokens": 1}}, {"stem": "00001"}):
        state.write_text(json.dumps({**stored, "chunks": [{**stored["chunks"][0], **change}]}))
        assert run(jsonl, tokenizer_dir, tmp_path / "out") == 2
        assert "state.json" in (line := one_line(capsys)) and f"remove the directory {state.parent}" in line
    state.write_text(json.dumps(stored))
    for path, content in whole.items():
        for change in (lambda path: path.write_bytes(content[:-1]), Path.unlink):  # noqa: B023
            change(path)
            assert run(jsonl, tokenizer_dir, tmp_path / "out") == 2
            assert "00000" in (line := one_line(capsys)) and "start afresh" in line
        path.write_bytes(content)


def test_one_process_at_a_time(jsonl: Path, tokenizer_dir: str, prepared: str, tmp_path: Path) -> None:
    """The lock is of the first process alone: a helper that it has forked does not hold it any longer."""
    prepare = ["data", "prepare", str(jsonl), "--tokenizer", tokenizer_dir, "--output", str(tmp_path / "out")]
    merge = ["data", "merge", prepared, "--output", str(tmp_path / "out")]
    holder = f"process {os.getpid()} on {socket.gethostname()}"

    def start(words: list[str]) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "nemodiff_train", *words], capture_output=True, text=True)
        return done.returncode, done.stderr

    with locked(tmp_path / "out"):
        helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        helper.start()
        for words in (prepare, merge):
            code, error = start(words)
            assert code == 2 and f"'{tmp_path / 'out'}' is being written by {holder}; wait for it" in error
    assert start(prepare)[0] == 0
    helper.kill()


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


def test_merge_refuses(prepared: str, tokenizer_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "one"}])
    for name, tokenizer in (
        ("a", tokenizer_dir),
        ("b", tokenizer_dir),
        ("c", save_tokenizer(tmp_path / "other", 280)),
    ):
        assert run(one, tokenizer, tmp_path / name) == 0
    Path(f"{tmp_path}/b.bin").write_bytes(Path(f"{tmp_path}/b.bin").read_bytes()[::-1])
    before = sorted(tmp_path.iterdir())
    cases = [
        ((prepared, prepared), "named twice"),
        ((prepared, str(tmp_path / "none")), "no such manifest"),
        ((prepared, str(tmp_path / "c")), "another tokenizer"),
        ((prepared, str(tmp_path / "b")), "its SHA-256 is not the manifest's"),
        ((prepared, str(tmp_path / "a"), "--output", str(tmp_path / "a")), "one of the shards"),
        ((str(tmp_path / "a"), "--output", str(tmp_path)), "a directory"),
        ((str(tmp_path / "a"), "--output", str(tmp_path / "one.jsonl" / "out")), "one.jsonl' is a file"),
    ]
    for words, message in cases:
        capsys.readouterr()
        assert main(["data", "merge", "--output", str(tmp_path / "out"), *words]) == 2
        assert message in one_line(capsys)
    assert sorted(tmp_path.iterdir()) == before


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


def test_links_of_a_tokenizer(tokenizer_dir: str, tmp_path: Path) -> None:
    """Those of Hugging Face's cache and inside the directory are followed; no other file of the machine is copied."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0a"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(Path(tokenizer_dir).iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "SYSTEM_PROMPT.txt").symlink_to("tokenizer.json")
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    for source in (snapshot, linked):
        copy_tokenizer(source, tmp_path / f"copy of {source.name}")
    for file in (tmp_path / "copy of linked").iterdir():
        assert file.read_bytes() == (tmp_path / "copy of 0a" / file.name).read_bytes() and not file.is_symlink()
    assert (tmp_path / "copy of 0a" / "SYSTEM_PROMPT.txt").stat().st_size > 0
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("a key")
    links = {
        "chat_template.jinja": secret / "key",
        "additional_chat_templates": secret,
        "vocab.txt": blobs / "by way",
    }
    (blobs / "by way").symlink_to(secret / "key")
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
        for use in (lambda: load_tokenizer(str(snapshot)), lambda: copy_tokenizer(snapshot, tmp_path / "none")):
            with pytest.raises(UserError, match=f"{name}.*secret/key.*remove the link"):
                use()
        (snapshot / name).unlink()
    assert not (tmp_path / "none").exists()
