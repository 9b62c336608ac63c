"""Drafters for self-speculation: adapters that act while a model drafts, and only then.

The loss and the adapters of ``drafter`` are Nemotron-Labs-Diffusion's (arXiv 2607.05722, section 3.3).  The paper
does not give its data, steps or learning rate; those here are a start.  ``drafter_uno`` is Uno (arXiv 2609.04010),
for models that are autoregressive alone, with the paper's run for an 8B model.  ``selector`` is the path selector of
DFlash 2 (Inco AI, 2026), for the drafts of either.
"""

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import indexed_dataset
from nemodiff_train.config.defaults import adamw, base_config, schedule, set_tensor_parallel
from nemodiff_train.drafter.config import DrafterConfig, uno, uno_objective
from nemodiff_train.drafter.config import selector as selector_switches
from nemodiff_train.model.draft_adapter import DraftLoRA, adapted_layers, with_selector
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig


def drafter(
    start_from: str, data: str, output: str, tensor_parallel: int = 1, lora_rank: int = 128, lora_alpha: int = 512
) -> TriModeConfig:
    """Train adapters of the attention outputs, everything else frozen.

    Args:
        start_from: Megatron checkpoint of the tri-mode model.
        data: Prefix of prepared text or conversations; best what the model itself has written.
        output: Folder of the run.
        tensor_parallel: Tensor-parallel size.
        lora_rank: Rank of the adapters.
        lora_alpha: Scale of the adapters' output, as a multiple of 1 / rank.
    """
    model = set_tensor_parallel(model_from(start_from), tensor_parallel)
    config = base_config(
        model,
        ObjectiveConfig(block_size=model.block_size, shift=model.shift),
        indexed_dataset(data, seq_length=4096),
        start_from=start_from,
        output=output,
        steps=2000,
        batch_size=128,
        optimizer=adamw(1e-4, 1e-5, sharded=True),
        scheduler=schedule(0.025, style="cosine"),
    )
    config.drafter, config.peft = DrafterConfig(), DraftLoRA(dim=lora_rank, alpha=lora_alpha)
    return config


def drafter_uno(
    start_from: str,
    data: str,
    output: str,
    tensor_parallel: int = 1,
    lora_rank: int = 128,
    lora_alpha: int = 2048,
    targets: str = "all",
    steps: int = 28125,
) -> TriModeConfig:
    """Train adapters with which an autoregressive model drafts for itself, everything else frozen.

    Blocks grow from 2 to 16 tokens, each size for an equal share of the steps.

    Args:
        start_from: Megatron checkpoint of the model, as 'nemodiff convert import' writes it.
        data: Prefix of prepared text or conversations; best what the model itself has written.
        output: Folder of the run.
        tensor_parallel: Tensor-parallel size.
        lora_rank: Rank of the adapters.
        lora_alpha: Scale of the adapters' output, as a multiple of 1 / rank.
        targets: Linear layers with adapters: all seven projections ('all'), or the attention output ('o_proj').
        steps: Training steps.
    """
    model = set_tensor_parallel(model_from(start_from), tensor_parallel)
    config = base_config(
        model,
        uno_objective(steps, model.shift),
        indexed_dataset(data, seq_length=4096),
        start_from=start_from,
        output=output,
        steps=steps,
        batch_size=128,
        optimizer=adamw(1e-5, 1e-5, sharded=True),
        scheduler=schedule(0.02, style="constant"),
    )
    config.optimizer.weight_decay = config.scheduler.start_weight_decay = config.scheduler.end_weight_decay = 0.0
    config.drafter = uno()
    config.peft = DraftLoRA(dim=lora_rank, alpha=lora_alpha, target_modules=adapted_layers(targets))
    return config


def selector(
    start_from: str,
    data: str,
    output: str,
    drafter: str | None = None,
    tensor_parallel: int = 1,
    rank: int = 256,
    steps: int = 500,
) -> TriModeConfig:
    """Train a path selector for the drafts of a drafter; its checkpoints hold the drafter's adapters too.

    Args:
        start_from: Megatron checkpoint of the model.
        data: Prefix of prepared text; best text that the model itself has written.
        output: Folder of the run.
        drafter: Checkpoint of a drafter of the model; without one, a tri-mode model's own drafts are selected from.
        tensor_parallel: Tensor-parallel size.
        rank: Rank of the selector's scores.
        steps: Training steps.
    """
    model = set_tensor_parallel(model_from(start_from), tensor_parallel)
    drafts = with_selector(model, drafter, rank)
    # What one step adds to a score grows with the number of its terms; seven times this made SmolLM2's drafts worse.
    peak = 0.024 / model.hidden_size
    config = base_config(
        model,
        ObjectiveConfig(block_size=drafts.block_size, shift=model.shift),
        indexed_dataset(data, 4096),
        start_from=start_from,
        output=output,
        steps=steps,
        batch_size=32,
        optimizer=adamw(peak, peak / 10, sharded=True),
        scheduler=schedule(0.025, style="cosine"),
    )
    config.drafter, config.peft = selector_switches(drafts.name), drafts.lora
    return config
