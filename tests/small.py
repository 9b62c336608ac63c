"""Small real things for tests: models, tokenizers, data, recipes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY = 320
EOD, MASK = "<|endoftext|>", "<|mask|>"


def tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 320 tokens, saved as Transformers saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[EOD, MASK], initial_alphabet=alphabet)
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog, 0123456789 times"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOD, mask_token=MASK).save_pretrained(directory)


def qwen3(directory: Path, mask_row: float = 1.0, **changes: Any) -> None:
    """A random Qwen 3 with its tokenizer; the mask token's embedding may be scaled."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _save(Qwen3ForCausalLM, Qwen3Config(**{**_sizes(64), **changes}), directory, mask_row)


def qwen2(directory: Path, **changes: Any) -> None:
    """A random Qwen 2.5: biases of queries, keys and values, a tied output layer, no norms of heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: value for name, value in _sizes(64).items() if name != "head_dim"}
    _save(Qwen2ForCausalLM, Qwen2Config(**{**sizes, "tie_word_embeddings": True, **changes}), directory)


def llama3(directory: Path, **changes: Any) -> None:
    """A random Llama 3 with its rope scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    _save(LlamaForCausalLM, LlamaConfig(**{**_sizes(64), "rope_parameters": rope, **changes}), directory)


def mistral(directory: Path, **changes: Any) -> None:
    """A random Mistral without a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**_sizes(64), "head_dim": 32, "sliding_window": None, **changes})
    _save(MistralForCausalLM, config, directory)


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


def ministral3(directory: Path, **changes: Any) -> None:
    """A random Ministral 3 text model: YaRN, a query scale, a head size that is not hidden / heads."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    config = Ministral3Config(**{**_sizes(48), "rope_parameters": YARN, **changes})
    _save(Ministral3ForCausalLM, config, directory)


def ministral3_vision(directory: Path, **changes: Any) -> None:
    """A random Ministral 3 as it is published: a language model beside a vision tower."""
    from transformers import Ministral3Config, Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

    sizes = _sizes(48)
    dtype = sizes.pop("dtype")
    text = Ministral3Config(**{**sizes, "rope_parameters": YARN, **changes})
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
    _save(Mistral3ForConditionalGeneration, config, directory)


def nemotron(directory: Path, dtype: str = "float32", **changes: Any) -> None:
    """A random NemotronLabsDiffusion directory: a Ministral 3 under other names, and a configuration of its own."""
    from safetensors.torch import load_file, save_file

    ministral3(directory, dtype=dtype)
    renamed = {
        name.replace("model.", "encoder.").replace("lm_head.", "diffusion_head."): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    sizes = {name: value for name, value in _sizes(48).items() if name not in ("dtype", "eos_token_id")}
    settings = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "torch_dtype": dtype,
        "rope_parameters": YARN,
        "mask_token_id": 1,
        "block_size": 16,
        "eos_token_id": 11,
        **sizes,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def _sizes(hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "eos_token_id": 0,
    }


def _save(model_class: Any, config: Any, directory: Path, mask_row: float = 1.0) -> None:
    torch.manual_seed(1)
    model = model_class(config).to(config.dtype)
    for parameter in model.parameters():  # norms of ones and weights of 0.02 would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.get_input_embeddings().weight.data[1] *= mask_row
    model.save_pretrained(directory)
    tokenizer(directory)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory."""
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes and every bit are the same."""
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )


QWEN3: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
"""Settings of a model that :func:`built` makes."""


def built(settings: dict[str, Any]) -> Any:
    """A random Megatron model of a small Qwen 3 on one process, with mask token 1."""
    from transformers import Qwen3Config

    return build(Qwen3Config(**{**_sizes(64), "architectures": ["Qwen3ForCausalLM"], **settings}))


def build(config: Any) -> Any:
    """A random Megatron model of a Hugging Face configuration, on one process, with mask token 1."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from megatron.core.utils import unwrap_model

    from nemodiff_train.model.loading import set_parallelism, start_model_parallel
    from nemodiff_train.model.pretrained import model_like

    start_model_parallel(1)
    provider = model_like(config)
    set_parallelism(provider)
    provider.perform_initialization, provider.noisy_views, provider.mask_token_id = True, 1, 1
    provider.finalize()
    return unwrap_model(provider.provide_distributed_model(wrap_with_ddp=False)[0]).train()


def batch(model: Any, length: int, stage: Any = "joint", index: int = 0, block: int = 32) -> dict[str, torch.Tensor]:
    """A random training sample of ``length`` clean tokens, as a micro-batch on the device."""
    from nemodiff_train.objective import ObjectiveConfig
    from nemodiff_train.objective.sample import SampleMaker
    from nemodiff_train.training.batch import to_device

    ids = torch.randint(2, model.config.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(index))
    plain = {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": torch.ones(length)}
    maker = SampleMaker(objective=ObjectiveConfig(stage=stage, block_size=block), mask_id=1)
    made = maker.make({**plain, "position_ids": torch.arange(length)}, 0, index)
    return to_device({name: values[None] for name, values in made.items()}, model.attention_state.shard)


def documents(draw: torch.Generator, length: int, block: int, average: int = 40) -> torch.Tensor:
    """[3, length] segment_ids of a sample whose documents end anywhere, after so many tokens on average."""
    from nemodiff_train.objective import ObjectiveConfig
    from nemodiff_train.objective.sample import SampleMaker

    maker = SampleMaker(objective=ObjectiveConfig(block_size=block), mask_id=5, document_end=0)
    tokens = torch.randint(0, average, (length + 1,), generator=draw)
    plain = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(length)}
    return maker.make({**plain, "position_ids": torch.arange(length)}, 0, 0)["segment_ids"]


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum of a micro-batch's losses, from a forward pass as training does it."""
    from functools import partial

    from nemodiff_train.training.step import _losses

    def total(batch: Any, losses: torch.Tensor) -> torch.Tensor:
        return (losses * batch["loss_mask"]).sum()

    model.config.noisy_views = batch["tokens"].shape[1] // batch["maskable"].shape[1] - 1
    process = partial(_losses, batch, total)
    return total(batch, model(batch["tokens"], batch["position_ids"], None, output_processor=process))


def step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Forward and backward; returns the loss."""
    found = loss(model, batch)
    found.backward()
    return found.item()


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Softmax attention of all pairs written out, [batch, heads, queries, head_dim]; fewer heads for keys."""
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def figures(output: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's ``metrics.jsonl``, without what depends on the clock."""
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "seconds")} for line in told
    ]


def data(prefix: Path, documents: int = 100, length: int = 300) -> None:
    """Documents of a learnable sequence as .bin/.idx; ids 20 .. 219."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    draw = np.random.default_rng(0)
    for _ in range(documents):
        size = int(draw.integers(length // 20, length))  # documents end inside samples, at any place
        ids = np.append(np.cumsum(draw.integers(0, 3, size - 1)) % 200 + 20, 0)
        builder.add_document(torch.from_numpy(ids), [size])
    builder.finalize(f"{prefix}.idx")


def recipe(start_from: str, data: str, output: str, stage: str = "joint", seq_length: int = 64) -> Any:
    """A run of ten steps in fp32."""
    from megatron.bridge.training import config as bridge
    from megatron.core.distributed import DistributedDataParallelConfig

    from nemodiff_train.config.config import TriModeConfig
    from nemodiff_train.config.datasets import TextDatasetConfig
    from nemodiff_train.config.defaults import tokenizer_of
    from nemodiff_train.model.pretrained import model_from
    from nemodiff_train.objective import ObjectiveConfig

    checkpoints = f"{output}/checkpoints"
    return TriModeConfig(
        model=model_from(start_from),
        objective=ObjectiveConfig(stage=stage, block_size=16),
        dataset=TextDatasetConfig(seq_length=seq_length, data=[data], split="100,0,0"),
        train=bridge.TrainingConfig(train_iters=10, global_batch_size=8, micro_batch_size=2),
        validation=bridge.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, bf16=False, use_distributed_optimizer=False
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=1,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        tokenizer=tokenizer_of(start_from),
        checkpoint=bridge.CheckpointConfig(
            save=checkpoints,
            load=checkpoints,
            pretrained_checkpoint=start_from,
            save_interval=1000,
            ckpt_format="torch_dist",
        ),
        logger=bridge.LoggerConfig(log_interval=1),
        rng=bridge.RNGConfig(seed=1),
    )


def of_preset(start_from: str, data: str, output: str, preset: str) -> Any:
    """:func:`recipe` with a published objective, at block sizes that fit its samples."""
    from nemodiff_train.objective.presets import preset as objective

    config = recipe(start_from, data, output)
    config.objective = objective(preset)
    return config


def drafter(start_from: str, data: str, output: str) -> Any:
    """A drafter of four layers for what :func:`recipe` has trained."""
    from nemodiff_train.drafter.config import DrafterConfig
    from nemodiff_train.model.draft_adapter import DraftLoRA

    config = recipe(start_from, data, output)
    config.drafter, config.peft = DrafterConfig(), DraftLoRA(dim=16, alpha=64)
    return config


def chat(start_from: str, data: str, output: str, rank: int = 0) -> Any:
    """Ten steps on conversations."""
    from nemodiff_train.config.datasets import ChatDatasetConfig
    from nemodiff_train.model.adapters import lora

    config = recipe(start_from, data, output)
    config.dataset = ChatDatasetConfig(seq_length=64, data=[data], split="100,0,0")
    config.peft = lora(rank)
    return config
