"""The parts of a configuration that most recipes share, with the paper's values as defaults."""

from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import (
    CheckpointConfig,
    DistributedDataParallelConfig,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    ValidationConfig,
)

from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.pretrained import local_copy


def adamw(peak: float = 1e-5, floor: float = 3e-6, *, sharded: bool = False) -> OptimizerConfig:
    """AdamW with weight decay 0.1 and gradient clipping at 1.

    Args:
        peak: Highest learning rate.
        floor: Learning rate at the end of the schedule.
        sharded: Shard its state over the data-parallel ranks.
    """
    return OptimizerConfig(
        optimizer="adam",
        lr=peak,
        min_lr=floor,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=1.0,
        use_distributed_optimizer=sharded,
    )


def sharded() -> DistributedDataParallelConfig:
    """Gradients as a sharded optimizer takes them; Bridge sees to it itself, but too late for :func:`overlap`."""
    return DistributedDataParallelConfig(use_distributed_optimizer=True)


def overlap() -> CommOverlapConfig:
    """Hide the traffic of data-parallel ranks behind computation: gradients go while the backward pass runs, weights
    come while the forward pass does.  It takes :func:`sharded` as well, and does nothing on one replica.

    Traffic of tensor-parallel ranks is not hidden: Transformer Engine's buffers for it have the shape of a training
    sample, and decoding in the loop has others.  ``comm_overlap.tp_comm_overlap=true`` does it where nothing decodes.
    """
    return CommOverlapConfig(tp_comm_overlap=False)


def schedule(warmup: int, *, style: str = "WSD", decay: int | None = None) -> SchedulerConfig:
    """Learning rate by step: linear warm-up, then ``style``.

    Args:
        warmup: Steps of warm-up.
        style: ``WSD`` (warm-up, stable, decay; the paper's) or ``cosine``.
        decay: Steps of the final decay of ``WSD``.
    """
    return SchedulerConfig(
        lr_decay_style=style,
        lr_warmup_iters=warmup,
        lr_wsd_decay_style="linear",
        lr_wsd_decay_iters=decay,
        start_weight_decay=0.1,
        end_weight_decay=0.1,
        weight_decay_incr_style="constant",
    )


def checkpoints(output: str, start_from: str | None, every: int) -> CheckpointConfig:
    """Save under ``output``, resume from there by itself, and start from a pretrained model otherwise.

    Args:
        output: The run's folder.
        start_from: Hugging Face directory or name, or Megatron checkpoint; None for random weights.
        every: Steps between checkpoints.
    """
    folder = f"{output}/checkpoints"
    return CheckpointConfig(
        save=folder,
        load=folder,
        pretrained_checkpoint=None if start_from is None else local_copy(start_from),
        save_interval=every,
        ckpt_format="torch_dist",
    )


def enable_async_save(saving: CheckpointConfig) -> None:
    """Let training go on while a process of each rank writes the checkpoint, from a copy in the host's memory."""
    saving.async_save, saving.async_strategy = True, "mcore"


def loggers(output: str, wandb_project: str | None = None) -> LoggerConfig:
    """TensorBoard under ``output``; Weights & Biases too when a project is named (offline unless logged in)."""
    return LoggerConfig(
        log_interval=1,
        tensorboard_dir=f"{output}/tensorboard",
        wandb_project=wandb_project,
        wandb_exp_name=output.rstrip("/").rpartition("/")[2] if wandb_project else None,
        wandb_save_dir=f"{output}/wandb" if wandb_project else None,
    )


def tokenizer_of(model: str) -> TokenizerConfig:
    """The Hugging Face tokenizer in a directory, of a name, or saved with a Megatron checkpoint."""
    if checkpoint := Checkpoint.find(model):
        model = str(checkpoint.tokenizer_directory)
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)


def no_validation() -> ValidationConfig:
    """Train without a validation loss."""
    return ValidationConfig(eval_interval=None, eval_iters=0)
