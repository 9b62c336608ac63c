"""Check that the weights in a Hugging Face directory are those that its model needs."""

import zlib

import torch
from torch import Tensor

from nemodiff_train.console import bytes_bar
from nemodiff_train.distributed import all_gather_object, global_rank, world_size
from nemodiff_train.errors import UserError
from nemodiff_train.model.bridges import auto_bridge
from nemodiff_train.model.families import VOCABULARY_TENSORS, ar_settings
from nemodiff_train.model.headers import TensorHeader, open_safetensors
from nemodiff_train.model.hf_directory import DTYPES, HFDirectory
from nemodiff_train.schema import checked, read_json

CHECKSUMS = "tensor_checksums.json"
"""Name of the file, in a directory that this project has exported, with the CRC-32 of each tensor."""


def check_weights(directory: HFDirectory) -> None:
    """Refuse weights that are missing, damaged, incomplete, or not those of the model; reads no data.

    Raises:
        UserError: Names the file and the tensor.
    """
    if directory.settings.get("quantization_config"):
        raise UserError(f"'{directory}' holds quantized weights; take the directory of the model in bf16")
    if (directory.path / "adapter_config.json").is_file():
        raise UserError(
            f"'{directory}' holds adapters beside the model (adapter_config.json), which Transformers would add to "
            "its weights; merge them, or remove the file"
        )
    _check_against_model(directory)
    # A tensor that Bridge would leave out, such as the biases of attention_bias.
    mappings = auto_bridge(directory.config)._model_bridge.mapping_registry()
    for name in directory.weights:
        if mappings.hf_to_megatron_lookup(name) is None:
            raise UserError(
                f"{directory.architecture} is not supported as '{directory}/config.json' describes it: Megatron has "
                f"no parameter for the tensor '{name}'; use a supported architecture (docs/conversion.md)"
            )
    _check_dtypes(directory.weights)


def _check_against_model(directory: HFDirectory) -> None:
    """Refuse tensors that are missing, of another shape, or not the model's; a tied output layer may be written."""
    stored = directory.weights
    layers = int(ar_settings(directory.settings).get("num_hidden_layers") or 0)
    if layers > len(stored):  # before a model of so many is built
        raise UserError(
            f"'{directory}/config.json': num_hidden_layers is {layers}, but there are {len(stored)} tensors; "
            "take both from the same model"
        )
    expected = {directory.stored_name(name): shape for name, shape in directory.shapes.items()}
    embedding, tied = map(directory.stored_name, VOCABULARY_TENSORS)
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"'{directory}' lacks the tensor '{name}' of {directory.architecture}; fetch it again")
        if stored[name].shape != shape:
            raise UserError(
                f"'{name}' in '{stored[name].file}' has the shape {list(stored[name].shape)}, but config.json makes "
                f"it {list(shape)}; take weights and config.json from the same model"
            )
    for name in sorted(set(stored) - set(expected)):
        if name != tied or not _equal(stored[name], name, stored[embedding], embedding):
            raise UserError(
                f"'{name}' in '{stored[name].file}' is not a tensor of {directory.architecture} as config.json "
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


def check_contents(directory: HFDirectory) -> None:
    """Compare the weights with the checksums, where there are any, and refuse NaN and infinity; called on all ranks.

    Every tensor is read once, each rank a part of them.

    Args:
        directory: Its weights have passed :func:`check_weights`.

    Raises:
        UserError: Names a damaged tensor and its file.
    """
    file = directory.path / CHECKSUMS
    checksums = checked(dict[str, str], read_json(file), file) if file.is_file() else {}
    own = list(directory.weights.items())[global_rank() :: world_size()]
    damaged = []
    with bytes_bar() as bar:
        task = bar.add_task(f"checking {directory}", total=sum(tensor.nbytes for _, tensor in own))
        for name, tensor in own:
            if reason := _content_damage(name, tensor, checksums.get(name)):
                damaged.append(f"'{name}' in '{tensor.file}' {reason}")
            bar.advance(task, tensor.nbytes)
    if problems := [line for lines in all_gather_object(damaged) for line in lines]:
        more = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}")


def _content_damage(name: str, tensor: TensorHeader, expected: str | None) -> str | None:
    """Return what is wrong with the values of a tensor, of which a checksum may be known, or None."""
    with open_safetensors(tensor.file) as content:
        values = content.get_tensor(name)
    if expected is not None and checksum(values) != expected:
        return (
            "has changed since it was exported; make the directory again, or remove "
            f"{CHECKSUMS} if it was changed on purpose"
        )
    if not all(torch.isfinite(bound) for bound in values.aminmax()):
        return "holds NaN or infinity; fetch it again"
    return None


def checksum(values: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, in hexadecimal."""
    return f"{zlib.crc32(raw_bytes(values)):08x}"


def raw_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return memoryview(values.detach().contiguous().view(-1).view(torch.uint8).numpy())
