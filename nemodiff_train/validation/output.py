"""What a run writes: its folder, and the evaluation in the training loop."""

from functools import partial
from pathlib import Path

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.decoding.decode import MODES
from nemodiff_train.errors import UserError, nearest, refusal
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.files import check_can_be_made

_WRITTEN = (
    "logger.tensorboard_dir",
    "logger.wandb_save_dir",
    "logger.save_config_filepath",
    "dataset.path_to_cache",
    "dataset.dataloader_save",
    "dist.flight_recorder_dump_path",
)
"""Files and folders that a run writes besides its own."""


def problems(config: TriModeConfig) -> list[str]:
    """Return what is wrong with the output folder and the evaluation in the loop, one line each."""
    lines = ["checkpoint.save is not set; name the folder for the checkpoints"] if not config.checkpoint.save else []
    folders = [Path(config.checkpoint.save)] if config.checkpoint.save else []
    for key in _WRITTEN:
        section, _, name = key.partition(".")
        if path := getattr(getattr(config, section), name, None):
            folders.append(Path(path).parent)
    for folder in folders:
        lines += refusal(partial(check_can_be_made, folder))
    return [*lines, *refusal(partial(_check_evaluation, config))]


def _check_evaluation(config: TriModeConfig) -> None:
    settings = config.evaluation
    if not settings.interval:
        return
    if unknown := next((mode for mode in settings.modes if mode not in MODES), None):
        raise UserError(f"evaluation.modes has '{unknown}'; known: {', '.join(MODES)}.{nearest(unknown, MODES)}")
    load_task(settings.task, scorer=settings.scorer, count=settings.count)
