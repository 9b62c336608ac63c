"""The weights in a Hugging Face directory: what is there, and whether it is what the model needs."""

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import read_json
from nemodiff_train.model.families import ar_settings, architecture, is_left_out, stored_name

INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names of dtypes in safetensors; what else there is holds no plain weights."""

_LONGEST = 255  # bytes of a file's name
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: Path
    dtype: str
    """As safetensors names it, such as ``BF16``."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        size = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1
        return size * int(torch.Size(self.shape).numel())


def check_weights(directory: Path) -> dict[str, Stored]:
    """Refuse weights that are missing, damaged, incomplete, or not those of the model; reads no data.

    A hub name is left to Transformers, which verifies what it downloads, and a Megatron checkpoint to Megatron.

    Returns:
        The model's tensors by their names in the files; empty for what is no Hugging Face directory.

    Raises:
        UserError: Names the file and the tensor.
    """
    if not (directory / "config.json").is_file():
        return {}
    settings = read_json(directory / "config.json")
    if "quantization_config" in settings:
        raise UserError(f"'{directory}' holds quantized weights; take the directory of the model in bf16")
    stored = {
        name: tensor
        for name, tensor in read_headers(directory).items()
        if not is_left_out(architecture(settings), name)
    }
    _check_against_model(directory, settings, stored)
    _check_dtypes(stored)
    return stored


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory, from the headers of its files.

    Raises:
        UserError: No safetensors, a file that is missing or cut off, or an index that does not fit the files.
    """
    weight_map = _index(directory)
    files = sorted({directory / name for name in weight_map.values()})
    # Some publishers put the weights beside them a second time, under names of their own.
    files = files or sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"'{directory}' has no *.safetensors; only safetensors weights are read")
    for file in files:
        _check_siblings(file)
    found: dict[str, Stored] = {}
    for file in files:
        with opened(file) as content:
            for name in content.keys():  # noqa: SIM118  (no mapping)
                if name in found:
                    raise UserError(f"'{name}' is both in '{found[name].file}' and in '{file}'; fetch both again")
                part = content.get_slice(name)
                found[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
    for name, file_name in weight_map.items():
        if name not in found or found[name].file.name != file_name:
            raise UserError(
                f"'{directory / INDEX}' says that '{name}' is in {file_name}, but it is not; fetch it again"
            )
    if extra := sorted(set(found) - set(weight_map)) if weight_map else []:
        raise UserError(f"'{found[extra[0]].file}' holds '{extra[0]}', which '{INDEX}' does not name; fetch it again")
    return found


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading.

    Raises:
        UserError: It is missing, cut off or no such file.
    """
    if not file.is_file():
        raise UserError(f"'{file}' is missing; fetch it again")
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise UserError(f"'{file}' is damaged or incomplete ({error}); fetch it again") from None


def expected_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names in the files, and shapes, of the weights that a ``config.json`` asks for.

    A tied output layer is not among them.
    """
    from transformers import AutoModelForCausalLM

    from nemodiff_train.model.pretrained import config_from

    config = config_from(ar_settings(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return {stored_name(architecture(settings), name): shape for name, shape in shapes.items()}


def _check_against_model(directory: Path, settings: dict[str, Any], stored: dict[str, Stored]) -> None:
    expected = expected_shapes(settings)
    tied = stored_name(architecture(settings), "lm_head.weight")
    table = stored_name(architecture(settings), "model.embed_tokens.weight")
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"'{directory}' lacks the tensor '{name}' of {architecture(settings)}; fetch it again")
        if stored[name].shape != shape:
            raise UserError(
                f"'{name}' in '{stored[name].file}' has the shape {list(stored[name].shape)}, but config.json makes "
                f"it {list(shape)}; take weights and config.json from the same model"
            )
    for name in sorted(set(stored) - set(expected)):
        if name != tied or not _equal(stored[name], name, stored[table], table):
            raise UserError(
                f"'{name}' in '{stored[name].file}' is no tensor of {architecture(settings)} as config.json "
                "describes it; take weights and config.json from the same model"
            )


def _equal(one: Stored, name: str, other: Stored, other_name: str) -> bool:
    """Whether two stored tensors are the same: an output layer that is tied may be written out all the same."""
    with opened(one.file) as first, opened(other.file) as second:
        return one.shape == other.shape and torch.equal(first.get_tensor(name), second.get_tensor(other_name))


def _check_dtypes(stored: dict[str, Stored]) -> None:
    first, usual = next(iter(stored.items()))
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"'{name}' in '{tensor.file}' is {tensor.dtype}; take weights in bf16, fp16 or fp32")
        if tensor.dtype != usual.dtype:
            raise UserError(
                f"'{name}' in '{tensor.file}' is {tensor.dtype}, but '{first}' is {usual.dtype}; "
                "take weights that all have one dtype"
            )


def check_contents(directory: Path, stored: dict[str, Stored], advance: Any, share: slice = slice(None)) -> list[str]:
    """Read the weights once: checksums where the directory has them, and numbers that are numbers.

    Args:
        stored: What :func:`check_weights` returned.
        advance: Called with the bytes of each tensor.
        share: Which of the tensors, where several ranks share the work.

    Returns:
        What is wrong, a line each.
    """
    file = directory / CHECKSUMS
    checksums = read_json(file) if file.is_file() else {}
    wrong = []
    for name, tensor in list(stored.items())[share]:
        with opened(tensor.file) as content:
            values = content.get_tensor(name)
        if name in checksums and checksum(values) != checksums[name]:
            wrong.append(
                f"'{name}' in '{tensor.file}' is not what was written there; make the directory again, or remove "
                f"{CHECKSUMS} if it was changed on purpose"
            )
        elif not all(torch.isfinite(bound) for bound in values.aminmax()):
            wrong.append(f"'{name}' in '{tensor.file}' holds values that are no numbers; fetch it again")
        advance(tensor.nbytes)
    return wrong


def checksum(values: Tensor) -> str:
    """CRC-32 of a tensor's bytes, in hexadecimal."""
    return f"{zlib.crc32(raw(values)):08x}"


def raw(values: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return memoryview(values.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _index(directory: Path) -> dict[str, str]:
    file = directory / INDEX
    if not file.is_file():
        return {}
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        names = {str(name): shard for name, shard in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"'{file}' is no index of safetensors; fetch it again") from None
    if outside := [shard for shard in names.values() if not _is_file_name(shard)]:
        raise UserError(f"'{file}' names '{outside[0]!s:.200}', which is not a file beside it; fetch it again")
    return names


def _is_file_name(shard: Any) -> bool:
    """Whether an index names what a file can be called, and no path."""
    return isinstance(shard, str) and Path(shard).name == shard and len(shard.encode(errors="replace")) <= _LONGEST


def _check_siblings(file: Path) -> None:
    """Of numbered files all must be there; without an index a missing one would go unnoticed."""
    if numbered := _NUMBERED.fullmatch(file.name):
        stem, _, count = numbered.groups()
        for number in range(1, int(count) + 1):
            sibling = file.with_name(f"{stem}-{number:05d}-of-{count}.safetensors")
            if not sibling.is_file():
                raise UserError(f"'{sibling}' is missing, but there are others of {int(count)}; fetch it again")
