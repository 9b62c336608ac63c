"""Damaged input for the readers of untrusted files and words, which may read it or raise a UserError.

A target draws an input and hands it to a reader as a user's file or word would reach it. Any other exception is a
finding, and so is an input that takes more than 30 seconds or 2 GiB.
"""

import copy
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from nemodiff_train.errors import UserError
from tests import small

SECONDS = 30
"""Limit of one input; the slowest takes about one second."""
MEMORY = 2 << 30
"""Bytes that one input may take beyond what the process has."""

Files = st.SearchStrategy[bytes]


@dataclass
class Inputs:
    """A folder with good inputs, which the targets damage."""

    folder: Path

    def __post_init__(self) -> None:
        from nemodiff_train.runtime import init_runtime

        init_runtime()
        small.qwen3(self.folder / "model")
        small.data(self.folder / "data", documents=5)
        small.qwen3(self.folder / "damaged")

    @cached_property
    def recipe(self) -> Any:
        """The configuration that overrides are applied to."""
        return small.recipe(*(str(self.folder / name) for name in ("model", "data", "out")))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        from nemodiff_train.data.tokenizer import load_tokenizer

        return load_tokenizer(str(self.folder / "model"))

    def write(self, name: str, content: bytes) -> Path:
        """Write a file of the folder."""
        path = self.folder / name
        path.write_bytes(content)
        return path


@dataclass(frozen=True)
class Target:
    """A kind of input."""

    strategy: Callable[[Inputs], st.SearchStrategy[Any]]
    read: Callable[[Inputs, Any], None]
    ready: Callable[[Inputs], None] = lambda inputs: None
    """Called before an input, without its limits."""


def attempt(target: Target, inputs: Inputs, drawn: Any) -> bool:
    """Read one input within the limits; return whether it was accepted, and raise what is a finding."""
    target.ready(inputs)
    with _limits():
        try:
            target.read(inputs, drawn)
        except UserError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1, f"a refusal of {len(lines)} lines: {error}"
            return False
    return True


@contextmanager
def _limits() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"one input took more than {SECONDS} seconds")


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Draw good bytes with some replaced, removed or inserted."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.sampled_from([0, 1, 2, 4, 8, len(content)]))
        content[start:stop] = draw(st.one_of(st.binary(max_size=16), _NUMBERS))
    return bytes(content)


_LIMITS = [0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1]
_NUMBERS = st.sampled_from([number.to_bytes(8, "little") for number in _LIMITS])
_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_DEPTHS = st.integers(1, 200_000).flatmap(lambda n: st.sampled_from(["[" * n, '{"a":' * n, "[" * n + "]" * n]))


def _lines(inputs: Inputs) -> Files:
    fields = st.sampled_from(["text", "prompt", "answer", "messages", "x"])
    message = st.dictionaries(st.sampled_from(["role", "content", "x"]), _JSON | st.just("assistant"), max_size=3)
    record = st.dictionaries(fields, _JSON | st.lists(message, max_size=3), max_size=4)
    good = st.just('{"text": "a b", "prompt": "1 + 1 =", "answer": "2"}')
    line = st.one_of(good, good, record.map(json.dumps), _JSON.map(json.dumps), _DEPTHS, st.text(max_size=20))
    text = st.lists(line, max_size=3).map("\n".join).map(lambda text: text.encode(errors="surrogatepass"))
    return text | st.binary(max_size=64) | text.filter(len).flatmap(damaged)


def _read_lines(inputs: Inputs, content: bytes) -> None:
    from nemodiff_train.data.columns import AnswerColumns, MessagesColumn, TextColumn
    from nemodiff_train.data.sources import documents, resolve
    from nemodiff_train.evaluation.records import LoggedRecord, read_jsonl
    from nemodiff_train.evaluation.tasks import load_task

    path = inputs.write("lines.jsonl", content)
    readers: list[Callable[[], Any]] = [
        lambda: list(documents(resolve([str(path)], TextColumn("text"), "train", "*"))),
        lambda: list(documents(resolve([str(path)], MessagesColumn("messages"), "train", "*"))),
        lambda: list(documents(resolve([str(path)], AnswerColumns("prompt", "answer"), "train", "*"))),
        lambda: load_task(str(path), scorer="exact"),
        lambda: load_task(str(path), scorer="numeric"),
        lambda: read_jsonl(path, LoggedRecord),
    ]
    _all(readers)


def _all(readers: list[Callable[[], Any]]) -> None:
    """Call every reader; raise a refusal if all of them refuse."""
    refusals = []
    for read in readers:
        try:
            read()
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(readers):
        raise refusals[0]


def _indexes(inputs: Inputs) -> Files:
    good = (inputs.folder / "data.idx").read_bytes()
    header = st.tuples(st.sampled_from([0, 1, 2**40]), st.integers(0, 255), _COUNTS, _COUNTS)
    made = header.map(lambda h: struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", *h))
    return damaged(good) | st.builds(bytes.__add__, made, st.binary(max_size=200)) | st.binary(max_size=64)


_COUNTS = st.sampled_from([0, 1, 2, 5, 6, 2**31, 2**60, 2**64 - 1])


def _read_index(inputs: Inputs, content: bytes) -> None:
    from nemodiff_train.data.blend import check_blend
    from nemodiff_train.data.indexed import IndexedDataset

    inputs.write("damaged.bin", (inputs.folder / "data.bin").read_bytes())
    inputs.write("damaged.idx", content)
    prefix = str(inputs.folder / "damaged")
    check_blend([prefix], inputs.tokenizer, inputs.tokenizer.mask_token_id)
    dataset = IndexedDataset(prefix)  # what is not refused, Megatron must be able to read
    assert sum(len(dataset[number]) for number in range(len(dataset))) > 0


@st.composite
def _tensor_files(draw: st.DrawFn, good: bytes) -> bytes:
    """Draw a safetensors file: a good one damaged, or a random header with some data."""
    if draw(st.booleans()):
        return draw(damaged(good))
    size = st.sampled_from([-1, 0, 1, 64, 320, 2**31, 2**62, 2**63, 10**30]) | st.integers(0, 100)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "F8_E4M3", "", "f32"]),
            "shape": st.lists(size, max_size=4),
            "data_offsets": st.lists(size, min_size=0, max_size=3),
        }
    )
    names = st.sampled_from(["lm_head.weight", "model.norm.weight", "__metadata__", "a"])
    header = json.dumps(draw(st.dictionaries(names, entry | _JSON, max_size=3))).encode()
    header = draw(st.sampled_from([header, b"{" * 1000, draw(_DEPTHS).encode()]))
    length = draw(st.sampled_from([len(header), len(header), 0, 2**40, 2**64 - 1]))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=64))


def _weights(inputs: Inputs) -> st.SearchStrategy[tuple[bytes, bytes | None]]:
    file = inputs.folder / "model" / "model.safetensors"
    names = st.sampled_from(["lm_head.weight", "a"])
    table = st.dictionaries(names, _JSON | st.just("model.safetensors"), max_size=2)
    listed = table.map(lambda names: json.dumps({"weight_map": names}).encode())
    index = st.none() | listed | _DEPTHS.map(str.encode) | st.binary(max_size=32)
    return st.tuples(_tensor_files(file.read_bytes()[:20_000]) | _tensor_files(file.read_bytes()), index)


def _read_weights(inputs: Inputs, content: tuple[bytes, bytes | None]) -> None:
    from nemodiff_train.conversion.weights import check_contents, check_weights
    from nemodiff_train.model.headers import INDEX
    from nemodiff_train.model.hf_directory import HFDirectory

    folder = inputs.folder / "damaged"
    inputs.write("damaged/model.safetensors", content[0])
    (folder / INDEX).unlink(missing_ok=True)
    if content[1] is not None:
        inputs.write(f"damaged/{INDEX}", content[1])
    check_weights(directory := HFDirectory(folder))
    check_contents(directory)


_WORDS = [
    "1", "0", "-1", "1e400", "nan", "inf", "true", "null", "abc", "''", "[]", "{}", "[1,2", "${oc.env:HOME}",
    "${model.num_layers}", "1" * 5000, "range(0,10)", "choice(a,b)", "int(x)", "str([1,2])", "{a:1}", "[[1],[2]]",
    "a=b", "/", "a b", "\\", "?", "???", "extend_list([1])", "[" * 300, "x" * 100_000,
]  # fmt: skip


def _overrides(inputs: Inputs) -> st.SearchStrategy[list[str]]:
    sections = ("objective", "dataset", "evaluation", "diagnostics", "train")
    keys = [f"{section}.{key}" for section in sections for key in vars(getattr(inputs.recipe, section))]
    keys += [f"model.{name}" for name in ("num_layers", "block_size", "tensor_model_parallel_size", "mask_token_id")]
    keys += ["optimizer.lr", "checkpoint.save", "checkpoint.load", "tokenizer.tokenizer_model", "model.hf_config"]
    key = st.sampled_from(keys) | st.text(max_size=12).map(lambda text: f"model.{text}")
    prefix = st.sampled_from(["", "", "", "", "+", "++", "~"])
    value = st.sampled_from(_WORDS) | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
    word = st.tuples(prefix, key, value).map(lambda parts: f"{parts[0]}{parts[1]}={parts[2]}")
    return st.lists(word, min_size=1, max_size=3)


def _read_overrides(inputs: Inputs, words: list[str]) -> None:
    from nemodiff_train.config.overrides import override
    from nemodiff_train.credentials import check_no_secrets
    from nemodiff_train.validation.check import check

    pairs = dict(word.split("=", 1) for word in words)
    check_no_secrets(pairs)
    check(override(copy.deepcopy(inputs.recipe), pairs), world_size=1)


_TEMPLATE = [
    "{{ messages }}", "{{ messages[0].content }}", "{{ messages[9].content }}", "{% for m in messages %}", "text",
    "{% endfor %}", "{% if x is defined %}", "{% endif %}", "{{ raise_exception('no') }}", "{{ 9 ** (9 ** 9) }}",
    "{{ 'a' * 10 ** 10 }}", "{% for i in range(99999) %}", "{{ ''.__class__.__mro__ }}", "{{ eos_token }}", "{{",
    "{{ [1] * 10 ** 9 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 / 0 }}", "{% include 'a' %}",
    "{{ '%999999999d' % 1 }}", "{{ messages.append(1) }}", "{{ x.y.z }}", "{% generation %}", "{%",
    "{{ lipsum(n=9999) }}", "{{ '{:>9999999999}'.format(1) }}", "{{ cycler.__init__.__globals__ }}",
]  # fmt: skip


def _templates(inputs: Inputs) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(_TEMPLATE) | st.text(max_size=10), max_size=5).map("".join)


RENDERING = 2.0
"""Seconds for a template in place of ten, since every fourth takes all of them."""


def _start_renderer(inputs: Inputs) -> None:
    from nemodiff_train.data.template import ChatTemplate

    inputs.tokenizer.chat_template = "{{ messages }}"
    ChatTemplate(inputs.tokenizer)([])


def _read_template(inputs: Inputs, template: str) -> None:
    from nemodiff_train.data import template as templates

    inputs.tokenizer.chat_template = template
    with patch.object(templates, "SECONDS", RENDERING):
        assert isinstance(templates.ChatTemplate(inputs.tokenizer)([{"role": "user", "content": "hello"}]), str)


TARGETS = {
    "overrides": Target(_overrides, _read_overrides),
    "jsonl": Target(_lines, _read_lines),
    "idx": Target(_indexes, _read_index),
    "safetensors": Target(_weights, _read_weights),
    "chat": Target(_templates, _read_template, _start_renderer),
}
