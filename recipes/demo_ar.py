"""A small Qwen 3 from random weights on the demo's text: the demo's "pretrained AR checkpoint"."""

from megatron.bridge.training.config import RNGConfig, TrainingConfig
from transformers import Qwen3Config

from nemodiff_train.config.config import TextDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import adamw, checkpoints, loggers, no_validation, schedule, tokenizer_of
from nemodiff_train.data.tokenizer import load_tokenizer, vocabulary_size
from nemodiff_train.model.pretrained import model_like
from nemodiff_train.objective import ObjectiveConfig

STEPS = 900


def recipe(tokenizer: str, problems: str, code: str, output: str) -> TriModeConfig:
    """Plain next-token training at L positions.

    Args:
        tokenizer: Directory of the demo's tokenizer.
        problems: Prefix of the arithmetic problems.
        code: Prefix of the standard library's source.
        output: The run's folder.
    """
    vocabulary = load_tokenizer(tokenizer)
    architecture = Qwen3Config(
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
    model = model_like(architecture)
    model.init_method_std, model.embedding_init_method_std = 0.08, 1.0  # so small a model learns sooner
    return TriModeConfig(
        model=model,
        objective=ObjectiveConfig(stage="ar"),
        dataset=TextDatasetConfig(seq_length=128, data=["0.9", problems, "0.1", code], split="100,0,0"),
        train=TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=4),
        optimizer=adamw(8e-3, 4e-4),
        scheduler=schedule(50, style="cosine"),
        checkpoint=checkpoints(output, None, every=STEPS),
        logger=loggers(output),
        tokenizer=tokenizer_of(tokenizer),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
    )
