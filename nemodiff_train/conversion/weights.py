"""Check that the weights in a Hugging Face directory are those that its model needs."""

import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nemodiff_train.conversion.headers import TensorHeader, open_safetensors, read_headers
from nemodiff_train.errors import UserError
from nemodiff_train.model.bridges import auto_bridge
from nemodiff_train.model.config_json import read_config
from nemodiff_train.model.families import HFConfig, ar_settings, architecture, is_left_out, stored_name
from nemodiff_train.model.pretrained import config_from, empty_reference
from nemodiff_train.schema import checked, read_json

CHECKSUMS = "tensor_checksums.json"
"""Name of the file, in a directory that this project has exported, with the CRC-32 of each tensor."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of plain weights by their names in safetensors."""


def check_weights(directory: Path) -> dict[str, TensorHeader]:
    """Refuse weights that are missing, damaged, incomplete, or not those of the model; reads no data.

    A hub name is left to Transformers, which verifies what it downloads, and a Megatron checkpoint to Megatron.

    Returns:
        Headers of the model's tensors by their names in the files; none for what is not a Hugging Face directory.

    Raises:
        UserError: Names the file and the tensor.
    """
    if not (directory / "config.json").is_file():
        return {}
    settings = read_config(directory)
    if settings.get("quantization_config"):
        raise UserError(f"'{directory}' holds quantized weights; take the directory of the model in bf16")
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"'{directory}' holds adapters beside the model (adapter_config.json), which Transformers would add to "
            "its weights; merge them, or remove the file"
        )
    stored = {
        name: tensor
        for name, tensor in read_headers(directory).items()
        if not is_left_out(architecture(settings), name)
    }
    _check_against_model(directory, settings, stored)
    # A tensor that Bridge would leave out, such as the biases of attention_bias.
    mappings = auto_bridge(config_from(settings))._model_bridge.mapping_registry()
    for name in stored:
        if mappings.hf_to_megatron_lookup(name) is None:
            raise UserError(
                f"{architecture(settings)} is not supported as '{directory}/config.json' describes it: Megatron has "
                f"no place for the tensor '{name}'"
            )
    _check_dtypes(stored)
    return stored


def expected_shapes(settings: HFConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a ``config.json`` asks for, by their names in the files.

    A tied output layer is not among them.
    """
    config = config_from(ar_settings(settings))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_reference(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return {stored_name(architecture(settings), name): shape for name, shape in shapes.items()}


def _check_against_model(directory: Path, settings: HFConfig, stored: dict[str, TensorHeader]) -> None:
    """Refuse tensors that are missing, of another shape, or not the model's; a tied output layer may be written."""
    layers = int(ar_settings(settings).get("num_hidden_layers") or 0)
    if layers > len(stored):  # before a model of so many is built
        raise UserError(
            f"'{directory}/config.json': num_hidden_layers is {layers}, but there are {len(stored)} tensors; "
            "take both from the same model"
        )
    expected = expected_shapes(settings)
    tied = stored_name(architecture(settings), "lm_head.weight")
    embedding = stored_name(architecture(settings), "model.embed_tokens.weight")
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"'{directory}' lacks the tensor '{name}' of {architecture(settings)}; fetch it again")
        if stored[name].shape != shape:
            raise UserError(
                f"'{name}' in '{stored[name].file}' has the shape {list(stored[name].shape)}, but config.json makes "
                f"it {list(shape)}; take weights and config.json from the same model"
            )
    for name in sorted(set(stored) - set(expected)):
        if name != tied or not _equal(stored[name], name, stored[embedding], embedding):
            raise UserError(
                f"'{name}' in '{stored[name].file}' is not a tensor of {architecture(settings)} as config.json "
                "describes it; take weights and config.json from the same model"
            )


def _equal(one: TensorHeader, name: str, other: TensorHeader, other_name: str) -> bool:
    """Return whether two stored tensors are the same; reads both."""
    with open_safetensors(one.file) as first, open_safetensors(other.file) as second:
        return one.shape == other.shape and torch.equal(first.get_tensor(name), second.get_tensor(other_name))


def _check_dtypes(stored: dict[str, TensorHeader]) -> None:
    """Refuse quantized tensors, and dtypes that differ."""
    first, usual = next(iter(stored.items()))
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"'{name}' in '{tensor.file}' is {tensor.dtype}; take weights in bf16, fp16 or fp32")
        if tensor.dtype != usual.dtype:
            raise UserError(
                f"'{name}' in '{tensor.file}' is {tensor.dtype}, but '{first}' is {usual.dtype}; "
                "take weights that all have one dtype"
            )


def check_contents(
    directory: Path, stored: dict[str, TensorHeader], advance: Callable[[int], None], shard: slice = slice(None)
) -> list[str]:
    """Read the weights once: compare them with the checksums, where there are any, and find NaN and infinity.

    Args:
        directory: Folder of the weights.
        stored: Headers, from :func:`check_weights`.
        advance: Called with the bytes of each tensor.
        shard: Which of the tensors this rank reads.

    Returns:
        One line per damaged tensor.
    """
    file = directory / CHECKSUMS
    checksums = checked(dict[str, str], read_json(file), file) if file.is_file() else {}
    problems = []
    for name, tensor in list(stored.items())[shard]:
        with open_safetensors(tensor.file) as content:
            values = content.get_tensor(name)
        if name in checksums and checksum(values) != checksums[name]:
            problems.append(
                f"'{name}' in '{tensor.file}' has changed since it was exported; make the directory again, or remove "
                f"{CHECKSUMS} if it was changed on purpose"
            )
        elif not all(torch.isfinite(bound) for bound in values.aminmax()):
            problems.append(f"'{name}' in '{tensor.file}' holds NaN or infinity; fetch it again")
        advance(tensor.nbytes)
    return problems


def checksum(values: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, in hexadecimal."""
    return f"{zlib.crc32(raw_bytes(values)):08x}"


def raw_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return memoryview(values.detach().contiguous().view(-1).view(torch.uint8).numpy())
