"""What each module of the ground floor does for all: ranks, files, consoles, and text from outside that is shown."""

import io
import re
import socket
from pathlib import Path

import pytest
from rich.table import Column, Table
from torch.distributed import TCPStore

import nemodiff_train
from nemodiff_train.console import PlainConsole, bytes_bar
from nemodiff_train.distributed import ReservedPort
from nemodiff_train.errors import RunStopped, UserError, escape_controls, escape_to_one_line
from nemodiff_train.files import LineLog

PACKAGE = Path(nemodiff_train.__file__).parent
EXPORTED = PACKAGE / "conversion" / "automodel"  # runs without this package


@pytest.mark.parametrize(
    ("home", "pattern"),
    [
        ("distributed.py", r"\bget_rank\(|\bget_world_size\(|environ\S*[\[(]\"(?:RANK|WORLD_SIZE)\""),
        ("files.py", r"\bfsync\(|\bos\.replace\("),
        ("console.py", r"\brich\.console\b"),
        ("errors.py", r"unicode_escape"),
    ],
)
def test_one_home(home: str, pattern: str) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if not file.is_relative_to(EXPORTED)]
    found = {str(file.relative_to(PACKAGE)) for file in files if re.search(pattern, file.read_text())}
    assert found == {home}


TURNED, STEERING = "\u202eabc\u2066 \u061c\u200f", "a\x1b[31mb\x07\x9b1m\rc"


def test_text_from_outside_is_spelled_out() -> None:
    assert escape_controls(TURNED) == r"\u202eabc\u2066 \u061c\u200f"
    assert escape_controls(STEERING) == r"a\x1b[31mb\x07\x9b1m\rc"
    kept = "two\r\nlines\tof \N{NO-BREAK SPACE}text, \N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}, \u05d0"
    assert escape_controls(kept) == kept and escape_controls("\ud800\u2028") == r"\ud800\u2028"
    assert escape_to_one_line("a\nb\u202e") == r"a\nb\u202e"
    for error in (UserError, RunStopped):
        assert str(error(f"{TURNED}\n")).isprintable()


def test_a_console_shows_text_as_it_is() -> None:
    """Also in tables and bars, where brackets would be rich's markup, and colons the names of its pictures."""
    console, hostile = PlainConsole(width=200), f"runs/[/x] [red]:boom: {TURNED}\x1b[31m"
    console.file = io.StringIO()
    table = Table(Column(hostile, min_width=100), title=hostile)
    table.add_row(hostile)
    for shown in (hostile, table):
        console.print(shown, soft_wrap=True)
    with bytes_bar() as bar:
        bar.add_task("[/x]\u202e")
        console.print(bar)
    written = console.file.getvalue()
    assert written.count(escape_controls(hostile)) == 4 and "\n[/x]" in written
    assert all(character.isprintable() or character == "\n" for character in written)


@pytest.mark.parametrize(("before", "after"), [("", "b\n"), ("a\n", "a\nb\n"), ("a\ncut", "a\ncut\nb\n")])
def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path, before: str, after: str) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(before)
    with LineLog(file) as log:
        log.write(["b"])
        assert file.read_text() == after  # before it is closed


def test_a_reserved_port_is_kept_for_a_store() -> None:
    """No other program gets it between the choice and the start of the server, which then can listen."""
    port = ReservedPort()
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", port.number))
    store = TCPStore("127.0.0.1", port.number, is_master=True, wait_for_workers=False)
    TCPStore("127.0.0.1", port.number).set("said", "hello")
    assert store.get("said") == b"hello"
