"""Models, tokenizers, data and recipes that train in a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemodiff_train.data.tokenizer_files import rename_for_transformers_4

VOCABULARY = 320
EOD, MASK = "<|endoftext|>", "<|mask|>"


def tokenizer(directory: Path) -> None:
    """Save a byte-level tokenizer of 320 tokens in the format of Transformers."""
    from transformers import PreTrainedTokenizerFast

    from nemodiff_train.demo.tokenizer import byte_level_bpe

    texts = ["the quick brown fox jumps over the lazy dog, 0123456789 times"] * 4
    inner = byte_level_bpe(texts, VOCABULARY, [EOD, MASK])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOD, mask_token=MASK).save_pretrained(directory)
    rename_for_transformers_4(directory)


def qwen3(directory: Path, mask_row: float = 1.0, **changes: Any) -> None:
    """Save a random Qwen 3 with its tokenizer; ``mask_row`` scales the mask token's embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    save(Qwen3ForCausalLM, Qwen3Config(**{**sizes(64), **changes}), directory, mask_row)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def sizes(hidden: int) -> dict[str, Any]:
    """Return the settings that every small model shares, for a hidden size."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "eos_token_id": 0,
    }


def save(model_class: Any, config: Any, directory: Path, mask_row: float = 1.0) -> None:
    """Save a random model with its tokenizer; ``mask_row`` scales the embedding of token 1, the mask token."""
    torch.manual_seed(1)
    model = model_class(config).to(config.dtype)
    for parameter in model.parameters():  # norms of ones and weights of 0.02 would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.get_input_embeddings().weight.data[1] *= mask_row
    model.save_pretrained(directory)
    tokenizer(directory)


def built(settings: dict[str, Any]) -> Any:
    """Build a random Megatron model of a small Qwen 3 on one process, with mask token 1."""
    from transformers import Qwen3Config

    return build(Qwen3Config(**{**sizes(64), "architectures": ["Qwen3ForCausalLM"], **settings}))


def build(config: Any) -> Any:
    """Build a random Megatron model of a Hugging Face configuration on one process, with mask token 1."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from megatron.core.utils import unwrap_model

    from nemodiff_train.model.loading import set_parallelism, start_model_parallel
    from nemodiff_train.model.pretrained import model_like
    from nemodiff_train.model.provider import LAYERS

    start_model_parallel(1)
    provider = model_like(config)
    set_parallelism(provider)
    provider.transformer_impl = LAYERS  # those of training
    provider.perform_initialization, provider.noisy_views, provider.mask_token_id = True, 1, 1
    provider.finalize()
    return unwrap_model(provider.provide_distributed_model(wrap_with_ddp=False)[0]).train()


def batch(model: Any, length: int, stage: Any = "joint", index: int = 0, block: int = 32) -> dict[str, torch.Tensor]:
    """Return a random training sample of ``length`` clean tokens as a micro-batch on the device."""
    from nemodiff_train.objective import ObjectiveConfig
    from nemodiff_train.objective.sample import SampleMaker
    from nemodiff_train.training.batch import to_device

    ids = torch.randint(2, model.config.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(index))
    plain = {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": torch.ones(length)}
    maker = SampleMaker(objective=ObjectiveConfig(stage=stage, block_size=block), mask_token_id=1)
    sample = maker.make({**plain, "position_ids": torch.arange(length)}, 0, index)
    return to_device({name: values[None] for name, values in sample.items()}, model.attention_state.shard)


def documents(draw: torch.Generator, length: int, block: int, average: int = 40) -> torch.Tensor:
    """Return [3, length] segment ids of a sample whose documents have ``average`` tokens on average."""
    from nemodiff_train.objective import ObjectiveConfig
    from nemodiff_train.objective.sample import SampleMaker

    maker = SampleMaker(objective=ObjectiveConfig(block_size=block), mask_token_id=5, eod_token_id=0)
    tokens = torch.randint(0, average, (length + 1,), generator=draw)
    plain = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(length)}
    return maker.make({**plain, "position_ids": torch.arange(length)}, 0, 0)["segment_ids"]


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weighted sum of a micro-batch's losses, from the forward pass of training."""
    from nemodiff_train.model.head import output_processor, token_losses

    weights, vocabulary = batch["loss_mask"], model.config.vocab_size

    def losses_of(states: torch.Tensor, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        return token_losses(states, batch["labels"], batch["loss_indices"], weights, vocabulary, layer, weight)

    model.config.noisy_views = batch["tokens"].shape[1] // batch["maskable"].shape[1] - 1
    losses = model(batch["tokens"], batch["position_ids"], None, output_processor=output_processor(losses_of))
    return (losses * weights).sum()


def step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Run forward and backward; return the loss."""
    total = loss(model, batch)
    total.backward()
    return total.item()


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Return softmax attention over all pairs under a mask, as formula.

    Shapes are [batch, heads, positions, head_dim]; keys and values may have fewer heads than queries.
    """
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def figures(output: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's ``metrics.jsonl``, without what depends on the clock."""
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    for step in steps:
        step.pop("tokens_per_second", None)
        step.pop("seconds", None)
    return steps


def data(prefix: Path, documents: int = 100) -> None:
    """Write documents of a learnable sequence of ids 20 to 219 as .bin/.idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    draw = np.random.default_rng(0)
    for _ in range(documents):
        size = int(draw.integers(15, 300))  # documents end anywhere inside samples
        ids = np.append(np.cumsum(draw.integers(0, 3, size - 1)) % 200 + 20, 0)
        builder.add_document(torch.from_numpy(ids), [size])
    builder.finalize(f"{prefix}.idx")


def recipe(start_from: str, data: str, output: str, stage: Any = "joint", seq_length: int = 64) -> Any:
    """Return the configuration of ten steps in fp32, on text or conversations."""
    from megatron.bridge.training import config as bridge
    from megatron.core.distributed import DistributedDataParallelConfig

    from nemodiff_train.config.config import TriModeConfig
    from nemodiff_train.config.datasets import indexed_dataset
    from nemodiff_train.config.defaults import tokenizer_of
    from nemodiff_train.model.pretrained import model_from
    from nemodiff_train.objective import ObjectiveConfig

    checkpoints = f"{output}/checkpoints"
    return TriModeConfig(
        model=model_from(start_from),
        objective=ObjectiveConfig(stage=stage, block_size=16),
        dataset=indexed_dataset(data, seq_length),
        train=bridge.TrainingConfig(train_iters=10, global_batch_size=8, micro_batch_size=2),
        validation=bridge.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, bf16=False, use_distributed_optimizer=False
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=1, start_weight_decay=0.1, end_weight_decay=0.1,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        tokenizer=tokenizer_of(start_from),
        checkpoint=bridge.CheckpointConfig(
            save=checkpoints, load=checkpoints, pretrained_checkpoint=start_from, save_interval=1000,
            ckpt_format="torch_dist",
        ),
        logger=bridge.LoggerConfig(log_interval=1),
        rng=bridge.RNGConfig(seed=1),
    )  # fmt: skip


def drafter(start_from: str, data: str, output: str, rank: int = 16, alpha: int = 64) -> Any:
    """Return the configuration of a drafter for a checkpoint that :func:`recipe` has trained."""
    from nemodiff_train.drafter.config import DrafterConfig
    from nemodiff_train.model.draft_adapter import DraftLoRA

    config = recipe(start_from, data, output)
    config.drafter, config.peft = DrafterConfig(), DraftLoRA(dim=rank, alpha=alpha)
    return config


def uno(start_from: str, data: str, output: str, rank: int = 8, alpha: int = 128) -> Any:
    """Return the configuration of a ``uno`` drafter of all projections for an imported AR model."""
    from nemodiff_train.drafter.config import uno as switches
    from nemodiff_train.model.draft_adapter import PROJECTIONS, DraftLoRA

    config = recipe(start_from, data, output)
    config.drafter, config.peft = switches(), DraftLoRA(dim=rank, alpha=alpha, target_modules=list(PROJECTIONS))
    return config


def selector(start_from: str, data: str, output: str, drafter: str | None = None, rank: int = 8) -> Any:
    """Return the configuration of a path selector for a drafter, or for the drafts of a tri-mode model."""
    from nemodiff_train.drafter.config import selector as switches
    from nemodiff_train.model.draft_adapter import with_selector

    config = recipe(start_from, data, output)
    drafts = with_selector(config.model, drafter, rank)
    config.objective.block_size = drafts.block_size
    config.drafter, config.peft = switches(drafts.name), drafts.lora
    return config


def chat(start_from: str, data: str, output: str, rank: int = 0) -> Any:
    """Return the configuration of ten steps on conversations; with LoRA of this rank unless it is 0."""
    from nemodiff_train.config.datasets import ChatDatasetConfig
    from nemodiff_train.model.adapters import lora

    config = recipe(start_from, data, output)
    config.dataset = ChatDatasetConfig(seq_length=64, data=[data], split="100,0,0")
    config.peft = lora(rank)
    return config


def sampler(block_size: int, correction: float) -> Any:
    """Return a trained sampler that corrects the model's log-odds at random, with weights of this deviation."""
    from nemodiff_train.sampler.description import Description
    from nemodiff_train.sampler.features import FEATURES
    from nemodiff_train.sampler.network import SlotNetwork
    from nemodiff_train.sampler.storage import TrainedSampler

    torch.manual_seed(0)
    network = SlotNetwork(block_size, layers=2, width=64)
    torch.nn.init.normal_(network.correction.weight, std=correction)
    sizes = {"block_size": block_size, "layers": 2, "width": 64, "features": list(FEATURES), "threshold": 0.6}
    source = {"checkpoint": "iter_0000001", "checksum": "0", "task": "arithmetic", "trajectories": 1}
    description = Description(**sizes, **source, trained=[], threshold_policy=[], oracle=2.0)  # type: ignore[arg-type]
    return TrainedSampler(network.eval(), description)
