"""What the tests build in small: everything of the tools, and the families of models that only tests need."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemodiff_train.objective.rule import CLEAN, Positions
from tools.support.small import *  # noqa: F403
from tools.support.small import VOCABULARY, YARN, data, qwen3, save, sizes

QWEN3: dict[str, Any] = {"vocab_size": VOCABULARY}
"""Settings of a model that :func:`built` makes."""


def qwen2(directory: Path, **changes: Any) -> None:
    """Save a random Qwen 2.5: biases of queries, keys and values, a tied output layer, no norms of heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = {name: value for name, value in sizes(64).items() if name != "head_dim"}
    save(Qwen2ForCausalLM, Qwen2Config(**{**settings, "tie_word_embeddings": True, **changes}), directory)


def llama3(directory: Path, **changes: Any) -> None:
    """Save a random Llama 3 with its rope scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    save(LlamaForCausalLM, LlamaConfig(**{**sizes(64), "rope_parameters": rope, **changes}), directory)


def mistral(directory: Path, **changes: Any) -> None:
    """Save a random Mistral without a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**sizes(64), "head_dim": 32, "sliding_window": None, **changes})
    save(MistralForCausalLM, config, directory)


def ministral3(directory: Path, **changes: Any) -> None:
    """Save a random Ministral 3 text model: YaRN, a query scale, a head size that is not hidden / heads."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    config = Ministral3Config(**{**sizes(48), "rope_parameters": YARN, **changes})
    save(Ministral3ForCausalLM, config, directory)


def ministral3_vision(directory: Path, **changes: Any) -> None:
    """Save a random Ministral 3 as it is published: a language model beside a vision tower."""
    from transformers import Ministral3Config, Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

    settings = sizes(48)
    dtype = settings.pop("dtype")
    text = Ministral3Config(**{**settings, "rope_parameters": YARN, **changes})
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        image_size=64,
        patch_size=16,
    )
    config = Mistral3Config(text_config=text, vision_config=vision, dtype=dtype, tie_word_embeddings=False)
    save(Mistral3ForConditionalGeneration, config, directory)


def nemotron(directory: Path, dtype: str = "float32", layers: int = 2, **changes: Any) -> None:
    """Save a random NemotronLabsDiffusion: a Ministral 3 under other names, with a configuration of its own."""
    from safetensors.torch import load_file, save_file

    ministral3(directory, dtype=dtype, num_hidden_layers=layers)
    renamed = {
        name.replace("model.", "encoder.").replace("lm_head.", "diffusion_head."): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    shared = {name: value for name, value in sizes(48).items() if name not in ("dtype", "eos_token_id")}
    settings = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "torch_dtype": dtype,
        "rope_parameters": YARN,
        "mask_token_id": 1,
        "block_size": 16,
        "eos_token_id": 11,
        **shared,
        "num_hidden_layers": layers,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def run_inputs(folder: Path, **changes: Any) -> Path:
    """Write a model, data and a recipe of a run into a folder; return it."""
    qwen3(folder / "model", **changes)
    data(folder / "data", documents=20)
    (folder / "recipe.py").write_text("from tests.small import recipe\n")
    return folder


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a Hugging Face directory."""
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """Return whether names, dtypes and every bit are the same."""
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )


def sample_positions(views: int, blocks: Tensor, documents: Tensor) -> Positions:
    """Return the positions of a whole training sample, ``[noisy views | clean]``.

    Args:
        views: Noisy views, V.
        blocks: [..., L] block of each position.
        documents: [..., L] document of each position.

    Returns:
        Four tensors: ``view`` [(V + 1) L], the others [..., (V + 1) L].
    """
    length = blocks.shape[-1]
    view = torch.tensor([*range(views), CLEAN], device=blocks.device).repeat_interleave(length)
    position = torch.arange(length, device=blocks.device)
    repeats = [1] * (blocks.dim() - 1) + [views + 1]
    return Positions(view, *(values.expand_as(blocks).repeat(repeats) for values in (position, blocks, documents)))
