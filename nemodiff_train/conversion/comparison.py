"""Compare Megatron's logits with Transformers': those of a miniature with a model's settings, and of the model."""

from collections.abc import Iterator, Mapping
from itertools import cycle, islice

import torch
from accelerate import cpu_offload
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from nemodiff_train.decoding.session import Session
from nemodiff_train.distributed import from_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.model.families import VOCABULARY_TENSORS, HFConfig, ar_settings
from nemodiff_train.model.headers import open_safetensors
from nemodiff_train.model.hf_directory import HFDirectory
from nemodiff_train.model.pretrained import build_reference, config_from, empty_reference

POSITIONS = 300
"""Tokens that a miniature reads, and never more than the model has positions."""
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Allowed difference of a miniature's fp32 logits, relative to the largest; a GPU may multiply in TF32."""
COMPARED_TOKENS = 16
"""Tokens that a model itself reads."""
ROUNDING = 32
"""Allowed difference of a model's logits, in units of its dtype's spacing at the largest logit."""


def miniature(settings: HFConfig, tensor_parallel: int, pipeline_parallel: int) -> PreTrainedModel:
    """Return a random fp32 model of a few layers in which all settings but the sizes are those of a ``config.json``.

    It is the same on every rank.

    Args:
        settings: The ``config.json``.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out.
    """
    settings = ar_settings(settings)
    config = config_from(settings)
    groups = 2 * tensor_parallel if config.num_key_value_heads != 1 else tensor_parallel
    heads = groups if config.num_key_value_heads == config.num_attention_heads else 2 * groups
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    separate_head_dim = head_dim * config.num_attention_heads != config.hidden_size
    layers = 2 * pipeline_parallel
    small = {
        "vocab_size": 64 * tensor_parallel,
        "hidden_size": head_dim * heads + (64 if separate_head_dim else 0),
        "intermediate_size": 128 * tensor_parallel,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "pad_token_id": None,
        **({"layer_types": list(islice(cycle(kinds), layers))} if (kinds := settings.get("layer_types")) else {}),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_reference(config_from({**settings, **small})).float()
        for parameter in model.parameters():  # norms of ones and biases of zeros would hide what is left out
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of an AR model in a directory, without a tied output layer: read when they are used, and not kept.

    Args:
        directory: Its weights have been checked.
        dtype: Dtype of the tensors that are returned.
    """

    def __init__(self, directory: HFDirectory, dtype: torch.dtype) -> None:
        self._dtype = dtype
        names = {name: directory.stored_name(name) for name in directory.shapes}
        self.files = {name: (directory.weights[name_there].file, name_there) for name, name_there in names.items()}
        """File of each tensor, and its name there."""

    def __getitem__(self, name: str) -> Tensor:
        file, name_there = self.files[name]
        with open_safetensors(file) as content:
            values: Tensor = content.get_tensor(name_there)
        return values.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def reference(directory: HFDirectory, dtype: torch.dtype) -> PreTrainedModel:
    """Return Transformers' model of a directory; a forward has the weights of one layer at a time in memory.

    Args:
        directory: Its weights have been checked.
        dtype: Dtype of the computation.
    """
    model = empty_reference(config_from(ar_settings(directory.settings)), dtype=dtype).eval()
    weights, (embedding, head) = StoredWeights(directory, dtype), VOCABULARY_TENSORS
    weights.files.setdefault(head, weights.files[embedding])  # tied
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    return model


def logits_differ(
    model: PreTrainedModel, chunks: list[GPTModel], length: int, left_out: int | None = None
) -> tuple[float, float]:
    """Return the largest difference between the causal logits of two implementations, and the largest logit.

    Args:
        model: Transformers' model, used on the main process alone.
        chunks: This rank's chunks of Megatron's model.
        length: Tokens of the random text.
        left_out: Id of a token that has other weights in both, on purpose: it is not in the text, and has no logit.
    """
    ids = torch.tensor([token for token in range(model.config.vocab_size) if token != left_out])
    tokens = ids[torch.randint(len(ids), (1, length), generator=torch.Generator().manual_seed(0))]
    # [1, length, vocabulary] logits of both, without that token's.
    session = Session(chunks, 1, length, None)
    logits = session.forward(tokens.to(session.device), torch.arange(1), "verify", causal=True).cpu()

    @torch.inference_mode()
    def compare() -> tuple[float, float]:
        try:
            expected = model(tokens).logits.float()[..., ids]
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"Transformers cannot run the model that config.json describes: {reason}") from None
        return float((logits[..., ids] - expected).abs().max()), float(expected.abs().max())

    return from_main_process(compare)


def unusual_settings(config: PreTrainedConfig) -> list[str]:
    """Return the settings of a model, sizes aside, that are not those of its class, as ``name=value``."""
    usual = type(config)().to_dict()
    sizes = ("size", "num_", "head_dim", "_token_id", "dtype", "architectures", "version", "max_position", "layer")
    return [
        f"{name}={value}"
        for name, value in config.to_dict().items()
        if value != usual.get(name) and not any(part in name for part in sizes)
    ]
