"""Types and ranges of every key that is read in a ``config.json`` and a ``generation_config.json``."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Field, with_config

from nemodiff_train.model.families import TRI_MODE, HFConfig, architecture
from nemodiff_train.schema import AS_WRITTEN, checked, read_json

Size = Annotated[int, Field(gt=0, lt=2**31)]
Token = Annotated[int, Field(ge=-1, lt=2**31)]
"""An id; -1 stands for none."""
Tokens = Token | Annotated[list[Token], Field(max_length=1000)] | None
Positive = Annotated[float, Field(gt=0, lt=1e30)]
Share = Annotated[float, Field(ge=0, le=1)]


class Rope(TypedDict, total=False):
    rope_type: str
    type: str
    rope_theta: Positive
    factor: Annotated[float, Field(gt=0, lt=1e9)] | None
    original_max_position_embeddings: Size | None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None
    attention_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    mscale: float | None
    mscale_all_dim: float | None
    llama_4_scaling_beta: Annotated[float, Field(ge=0, lt=1e3)] | None


@with_config(AS_WRITTEN)
class _Special(TypedDict, total=False):
    """Tokens with a role: a ``generation_config.json`` has these as well."""

    bos_token_id: Tokens
    eos_token_id: Tokens
    pad_token_id: Token | None


@with_config(AS_WRITTEN)
class _Config(_Special, total=False):
    architectures: Annotated[list[str], Field(min_length=1)] | None
    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None
    max_position_embeddings: Size
    max_window_layers: Annotated[int, Field(ge=0, lt=2**31)] | None
    sliding_window: Annotated[int, Field(ge=0, lt=2**31)] | None
    use_sliding_window: bool | None
    layer_types: list[str] | None
    hidden_act: str | None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    initializer_range: Share
    attention_dropout: Share | None
    attention_bias: bool | None
    mlp_bias: bool | None
    tie_word_embeddings: bool
    rope_theta: Positive | None
    rope_scaling: Rope | None
    rope_parameters: Rope | None
    dtype: str | None
    torch_dtype: str | None
    auto_map: dict[str, str | list[str | None]] | None
    # Of block diffusion.
    mask_token_id: Token | None
    block_size: Annotated[int, Field(gt=0, le=65_536)]
    shift: bool
    clean_attention: Literal["causal", "block_causal"]


@with_config(AS_WRITTEN)
class _Nested(_Config, total=False):
    text_config: _Config


@with_config(AS_WRITTEN)
class _TriMode(TypedDict):
    """Keys that a directory that decodes in every mode must have."""

    mask_token_id: Annotated[int, Field(ge=0)]
    block_size: int
    shift: bool
    clean_attention: str
    text_config: _Config


def check_config(settings: HFConfig, file: Path) -> HFConfig:
    """Return the content of a ``config.json`` as it is.

    Raises:
        UserError: Names the file, the key, and what it should be.
    """
    checked(_Nested, settings, file)
    if architecture(settings) == TRI_MODE:
        checked(_TriMode, settings, file)
    return settings


def check_generation_config(settings: HFConfig, file: Path) -> HFConfig:
    """Return the content of a ``generation_config.json`` as it is.

    Raises:
        UserError: The same.
    """
    checked(_Special, settings, file)
    return settings


def read_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a Hugging Face directory.

    Raises:
        UserError: It cannot be read, or a key has a value that no model can be made with.
    """
    file = folder / "config.json"
    return check_config(read_json(file), file)
