"""The configuration that recipes start from, and its parts, with the paper's values as defaults."""

from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import (
    CheckpointConfig,
    DistributedDataParallelConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import IndexedDatasetConfig
from nemodiff_train.config.schedule import ScheduleConfig
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.pretrained import local_copy
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.objective import ObjectiveConfig


def base_config(
    model: TriModeModelProvider,
    objective: ObjectiveConfig,
    dataset: IndexedDatasetConfig,
    *,
    start_from: str | None,
    output: str,
    steps: int,
    batch_size: int,
    micro_batch_size: int = 1,
    optimizer: OptimizerConfig,
    scheduler: SchedulerConfig,
    save_interval: int = 500,
    precision: str | None = "bf16_mixed",
) -> TriModeConfig:
    """Return the complete configuration of a run, for a recipe to change.

    Args:
        model: The architecture and its layout.
        objective: The training objective.
        dataset: The data.
        start_from: Hugging Face directory or name, or Megatron checkpoint, with its tokenizer; None for random
            weights, which takes a ``config.tokenizer``.
        output: Folder of the run.
        steps: Number of training steps.
        batch_size: Samples per step.
        micro_batch_size: Samples per forward pass of a replica.
        optimizer: See :func:`adamw`.
        scheduler: See :func:`schedule`.
        save_interval: Steps between checkpoints.
        precision: Name of one of Megatron Bridge's mixed precisions, or ``fp32``; None for what fits the model and
            the machine (:func:`~nemodiff_train.config.precision.precision_of`).
    """
    return TriModeConfig(
        model=model,
        objective=objective,
        dataset=dataset,
        train=TrainingConfig(train_iters=steps, global_batch_size=batch_size, micro_batch_size=micro_batch_size),
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoint=checkpoints(output, start_from, every=save_interval),
        logger=loggers(output),
        tokenizer=tokenizer_of(start_from) if start_from else TokenizerConfig(),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
        mixed_precision=precision,
    )


def check_size(model: TriModeModelProvider, start_from: str, layers: int, hidden: int) -> None:
    """Refuse a model that is not of the size that a recipe is for.

    Raises:
        UserError: Names both sizes.
    """
    if (model.num_layers, model.hidden_size) != (layers, hidden):
        raise UserError(
            f"'{start_from}' has {model.num_layers} layers of width {model.hidden_size}, but this recipe is for "
            f"{layers} of width {hidden}; take the recipe of its size, or 'joint' for another model"
        )


def set_tensor_parallel(model: TriModeModelProvider, size: int) -> TriModeModelProvider:
    """Set the tensor-parallel size of a model, with sequence parallelism, and return the model."""
    model.tensor_model_parallel_size, model.sequence_parallel = size, size > 1
    return model


def adamw(peak: float = 1e-5, floor: float = 3e-6, *, sharded: bool = False) -> OptimizerConfig:
    """Return AdamW with weight decay 0.1 and gradient clipping at 1.

    Args:
        peak: Highest learning rate.
        floor: Learning rate at the end of the schedule.
        sharded: Whether its state is sharded over the data-parallel ranks.
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


def overlap_communication(config: TriModeConfig) -> None:
    """Overlap the communication of data-parallel ranks with computation; takes ``adamw(..., sharded=True)``.

    The communication of tensor-parallel ranks is not: it excludes decoding in the loop; see docs/performance.md.
    """
    config.ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    config.comm_overlap = CommOverlapConfig(tp_comm_overlap=False)


def schedule(warmup: float, *, style: str = "WSD", decay: float | None = None) -> ScheduleConfig:
    """Return a learning-rate schedule: linear warm-up, then ``style``.

    Args:
        warmup: Share of the run in warm-up, such as 0.01; a whole number of steps as an ``int``.
        style: ``WSD`` (warm-up, stable, decay; the paper's) or ``cosine``.
        decay: The same for the final decay of ``WSD``.
    """
    return ScheduleConfig(
        lr_decay_style=style,
        lr_warmup_iters=warmup if isinstance(warmup, int) else 0,
        lr_warmup_fraction=None if isinstance(warmup, int) else warmup,
        lr_wsd_decay_style="linear",
        lr_wsd_decay_iters=decay if isinstance(decay, int) else None,
        lr_wsd_decay_fraction=None if isinstance(decay, int) else decay,
        start_weight_decay=0.1,
        end_weight_decay=0.1,
        weight_decay_incr_style="constant",
    )


def checkpoints(output: str, start_from: str | None, every: int) -> CheckpointConfig:
    """Save under ``output``, resume from its newest checkpoint, and start from a pretrained model if there is none.

    The state of a distributed optimizer is saved so that any layout can go on with it.

    Args:
        output: Folder of the run.
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
        dist_ckpt_optim_fully_reshardable=True,
        async_write_results_mp_mode="spawn",  # a fork of a process with threads may stand still, and is as large
    )


def loggers(output: str, wandb_project: str | None = None) -> LoggerConfig:
    """Log to TensorBoard under ``output``, and to W&B if a project is named (offline unless logged in)."""
    return LoggerConfig(
        log_interval=1,
        tensorboard_dir=f"{output}/tensorboard",
        wandb_project=wandb_project,
        wandb_exp_name=output.rstrip("/").rpartition("/")[2] if wandb_project else None,
        wandb_save_dir=f"{output}/wandb" if wandb_project else None,
    )


def tokenizer_of(model: str) -> TokenizerConfig:
    """Return the tokenizer of a Hugging Face directory or name, or the one saved with a Megatron checkpoint."""
    if checkpoint := Checkpoint.find(model):
        model = str(checkpoint.tokenizer_directory)
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)


def no_validation() -> ValidationConfig:
    """Train without a validation loss."""
    return ValidationConfig(eval_interval=None, eval_iters=0)
