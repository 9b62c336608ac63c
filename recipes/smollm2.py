"""SmolLM2-135M becomes tri-mode on two cores: the main workflow, and drafters, on a small pretrained model.

docs/results/smollm2.md has the commands and what they gave.
"""

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import TextDatasetConfig
from nemodiff_train.config.defaults import adamw, base_config, schedule
from nemodiff_train.drafter.config import DrafterConfig, selector, uno, uno_objective
from nemodiff_train.model.draft_adapter import DraftLoRA, adapted_layers, with_selector
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.objective import ObjectiveConfig


def smollm2_joint(start_from: str, data: str, output: str, steps: int = 1000) -> TriModeConfig:
    """Turn SmolLM2 into a tri-mode model: a million tokens, some hours on two cores, minutes on a GPU.

    Departures from the paper make so short a training worth while: the shift, which reuses what the AR model
    knows; fully masked samples, which drafts start from; a diffusion loss that weighs as much as the AR loss; and a
    noise level for each block, which steadies the gradient of so small a batch.

    Args:
        start_from: The model: its Hugging Face directory, or a Megatron checkpoint with a mask token.
        data: Prefix of prepared text.
        output: Folder of the run.
        steps: Training steps of 1024 tokens.
    """
    objective = ObjectiveConfig(
        block_size=16, alpha=1.0, shift=True, fully_masked_fraction=0.2, noise_granularity="block"
    )
    return _short_run(model_from(start_from), objective, start_from, data, output, steps, peak=5e-4)


def smollm2_drafter(start_from: str, data: str, output: str, steps: int = 200) -> TriModeConfig:
    """Train a drafter for it: adapters of the attention outputs.

    Args:
        start_from: Checkpoints of the joint stage.
        data: Prefix of prepared text.
        output: Folder of the run.
        steps: Training steps of 1024 tokens.
    """
    model = model_from(start_from)
    objective = ObjectiveConfig(block_size=model.block_size, shift=model.shift)
    config = _short_run(model, objective, start_from, data, output, steps, peak=1e-3)
    config.drafter, config.peft = DrafterConfig(), DraftLoRA(dim=64, alpha=256)
    return config


def smollm2_selector(
    start_from: str, data: str, output: str, drafter: str | None = None, steps: int = 200
) -> TriModeConfig:
    """Train a path selector for the drafts of one of its drafters, or of its tri-mode model without one.

    Args:
        start_from: Checkpoint that the drafter is for.
        data: Prefix of prepared text.
        output: Folder of the run.
        drafter: Checkpoints of the drafter.
        steps: Training steps of 1024 tokens.
    """
    model = model_from(start_from)
    drafts = with_selector(model, drafter, rank=256)
    objective = ObjectiveConfig(block_size=drafts.block_size, shift=model.shift)
    config = _short_run(model, objective, start_from, data, output, steps, peak=4e-5)
    config.drafter, config.peft = selector(drafts.name), drafts.lora
    return config


def smollm2_drafter_uno(start_from: str, data: str, output: str, steps: int = 200) -> TriModeConfig:
    """Train adapters with which the model drafts for itself as it is: no joint stage.

    Args:
        start_from: The imported model.
        data: Prefix of prepared text.
        output: Folder of the run.
        steps: Training steps of 1024 tokens; blocks of every size have an equal share.
    """
    model = model_from(start_from)
    config = _short_run(model, uno_objective(steps, model.shift), start_from, data, output, steps, peak=1e-3)
    config.drafter, config.peft = uno(), DraftLoRA(dim=32, alpha=512, target_modules=adapted_layers("all"))
    return config


def _short_run(
    model: TriModeModelProvider,
    objective: ObjectiveConfig,
    start_from: str,
    data: str,
    output: str,
    steps: int,
    peak: float,
) -> TriModeConfig:
    """Return a run of 1024 tokens per step with a checkpoint at its end, in the precision that fits the machine."""
    return base_config(
        model,
        objective,
        TextDatasetConfig(seq_length=256, data=[data], split="100,0,0"),
        start_from=start_from,
        output=output,
        steps=steps,
        batch_size=4,
        optimizer=adamw(peak, peak / 10),
        scheduler=schedule(warmup=max(1, steps // 20), style="cosine"),
        save_interval=steps,
        precision=None,
    )
