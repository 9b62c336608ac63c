"""The demo's runs, in minutes on two cores: an AR model, its joint stage, drafters for both, and conversations."""

from typing import Any

from transformers import Qwen3Config

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import ChatDatasetConfig, TextDatasetConfig
from nemodiff_train.config.defaults import adamw, base_config, schedule, tokenizer_of
from nemodiff_train.data.tokenizer import load_tokenizer, vocabulary_size
from nemodiff_train.drafter.config import DrafterConfig, selector, uno, uno_objective
from nemodiff_train.model.adapters import lora
from nemodiff_train.model.draft_adapter import DraftLoRA, adapted_layers, with_selector
from nemodiff_train.model.pretrained import model_from, model_like
from nemodiff_train.objective import ObjectiveConfig


def demo_ar(tokenizer: str, problems: str, code: str, output: str) -> TriModeConfig:
    """Train a small Qwen 3 from random weights: the demo's "pretrained AR checkpoint".

    Args:
        tokenizer: Directory of the demo's tokenizer.
        problems: Prefix of the arithmetic problems.
        code: Prefix of the standard library's source.
        output: Folder of the run.
    """
    model = model_like(_small_qwen3(tokenizer))
    model.init_method_std, model.embedding_init_method_std = 0.08, 1.0  # so small a model learns sooner
    objective = ObjectiveConfig(stage="ar")
    run = _short_run(steps=900, warmup=50, peak=8e-3)
    config = base_config(model, objective, _text(problems, code), start_from=None, output=output, **run)
    config.tokenizer = tokenizer_of(tokenizer)
    config.train.micro_batch_size = 4
    return config


def demo_joint(
    start_from: str,
    problems: str,
    code: str,
    output: str,
    tensor_parallel: int = 1,
    steps: int = 700,
    mask_token: str | None = None,
) -> TriModeConfig:
    """Turn an AR model into a tri-mode model.

    Args:
        start_from: The AR model: a Hugging Face directory or a Megatron checkpoint.
        problems: Prefix of the arithmetic problems, prepared with the model's tokenizer.
        code: Prefix of the standard library's source.
        output: Folder of the run.
        tensor_parallel: Tensor-parallel size.
        steps: Training steps of 1024 tokens.
        mask_token: A token of the model's tokenizer that never occurs in text; by default its mask token.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = tensor_parallel
    peak = 5e-3 * min(1.0, 128 / model.hidden_size) ** 1.5  # wider models take smaller steps
    # Two departures from the paper, for a training of minutes: a one-shot draft starts from fully masked samples, and
    # the shift lets the noisy half reuse the sums that the AR model can do already.
    objective = ObjectiveConfig(block_size=32, mask_token=mask_token, fully_masked_fraction=0.5, shift=True)
    run = _short_run(steps, min(30, steps // 10), peak)
    config = base_config(model, objective, _text(problems, code), start_from=start_from, output=output, **run)
    if tensor_parallel == 1:
        config.train.micro_batch_size = 4  # there may be two replicas
    return config


def demo_drafter(start_from: str, problems: str, output: str, steps: int = 600) -> TriModeConfig:
    """Train adapters of full rank on the attention outputs of the demo's tri-mode model.

    Args:
        start_from: Checkpoints of the demo's joint stage.
        problems: Prefix of the arithmetic problems.
        output: Folder of the run.
        steps: Training steps.
    """
    model = model_from(start_from)
    objective = ObjectiveConfig(block_size=model.block_size, shift=model.shift)
    run = _short_run(steps, warmup=10, peak=4e-3)
    config = base_config(model, objective, _text(problems), start_from=start_from, output=output, **run)
    return _with_drafter(config, DrafterConfig(), DraftLoRA(dim=128, alpha=512))


def demo_drafter_uno(start_from: str, problems: str, output: str, steps: int = 600) -> TriModeConfig:
    """Train adapters with which the demo's AR model drafts for itself.

    Args:
        start_from: Checkpoints of the demo's AR stage.
        problems: Prefix of the arithmetic problems.
        output: Folder of the run.
        steps: Training steps; blocks of every size have an equal share.
    """
    model = model_from(start_from)
    objective = uno_objective(steps, model.shift)
    run = _short_run(steps, warmup=10, peak=1e-3)
    config = base_config(model, objective, _text(problems), start_from=start_from, output=output, **run)
    return _with_drafter(config, uno(), DraftLoRA(dim=128, alpha=2048, target_modules=adapted_layers("all")))


def demo_selector(
    start_from: str, problems: str, output: str, drafter: str | None = None, steps: int = 300
) -> TriModeConfig:
    """Train a path selector for the drafts of one of the demo's drafters, or of its tri-mode model without one.

    Args:
        start_from: Checkpoints of the stage that the drafter is for.
        problems: Prefix of the arithmetic problems.
        output: Folder of the run.
        drafter: Checkpoints of the drafter.
        steps: Training steps.
    """
    model = model_from(start_from)
    drafts = with_selector(model, drafter, rank=256)
    objective = ObjectiveConfig(block_size=drafts.block_size, shift=model.shift)
    run = _short_run(steps, warmup=10, peak=5e-3)
    config = base_config(model, objective, _text(problems), start_from=start_from, output=output, **run)
    return _with_drafter(config, selector(drafts.name), drafts.lora)


def demo_sft(start_from: str, data: str, output: str, lora_rank: int = 0, tensor_parallel: int = 1) -> TriModeConfig:
    """Teach the demo's tri-mode model to converse.

    Args:
        start_from: Checkpoints of the demo's joint stage.
        data: Prefix of the demo's conversations, prepared with --chat.
        output: Folder of the run.
        lora_rank: Rank of LoRA; 0 to train all weights.
        tensor_parallel: Tensor-parallel size.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = tensor_parallel
    objective = ObjectiveConfig(block_size=model.block_size, shift=model.shift, fully_masked_fraction=0.2)
    dataset = ChatDatasetConfig(seq_length=256, data=[data], split="100,0,0")
    run = _short_run(steps=300, warmup=10, peak=1e-3)
    config = base_config(model, objective, dataset, start_from=start_from, output=output, **run)
    config.peft = lora(lora_rank)
    return config


def _short_run(steps: int, warmup: int, peak: float) -> dict[str, Any]:
    """Return what all runs have in common: batches of 8, one checkpoint at the end, the machine's precision."""
    return {
        "steps": steps,
        "batch_size": 8,
        "micro_batch_size": 8,
        "optimizer": adamw(peak, peak / 20),
        "scheduler": schedule(warmup / steps, style="cosine"),
        "save_interval": steps,
        "precision": None,
    }


def _with_drafter(config: TriModeConfig, drafter: DrafterConfig, adapters: DraftLoRA) -> TriModeConfig:
    """Return the run with a drafter to train, in batches of 16 samples."""
    config.train.global_batch_size = 16
    config.drafter, config.peft = drafter, adapters
    return config


def _text(problems: str, code: str | None = None) -> TextDatasetConfig:
    blend = ["0.9", problems, "0.1", code] if code else [problems]
    return TextDatasetConfig(seq_length=128, data=blend, split="100,0,0")


def _small_qwen3(tokenizer: str) -> Qwen3Config:
    vocabulary = load_tokenizer(tokenizer)
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=vocabulary_size(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        eos_token_id=vocabulary.eos_token_id,
        dtype="float32",
    )
