"""What a run writes: its folder, and the evaluation in the training loop."""

from functools import partial
from pathlib import Path

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.decoding.decode import MODES
from nemodiff_train.errors import UserError, nearest
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.files import check_can_be_made
from nemodiff_train.validation.refusal import refusal

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
    return [
        *refusal(lambda: _check_folder(config)),
        *(line for key in _WRITTEN for line in refusal(partial(_check_written, config, key))),
        *refusal(lambda: _check_evaluation(config)),
    ]


def _check_folder(config: TriModeConfig) -> None:
    if not config.checkpoint.save:
        raise UserError("checkpoint.save is not set; name the folder for the checkpoints")
    check_can_be_made(Path(config.checkpoint.save))


def _check_written(config: TriModeConfig, key: str) -> None:
    section, _, name = key.partition(".")
    if path := getattr(getattr(config, section), name, None):
        check_can_be_made(Path(path).parent)


def _check_evaluation(config: TriModeConfig) -> None:
    settings = config.evaluation
    if not settings.interval:
        return
    if unknown := next((mode for mode in settings.modes if mode not in MODES), None):
        raise UserError(f"evaluation.modes has '{unknown}'; known: {', '.join(MODES)}.{nearest(unknown, MODES)}")
    load_task(settings.task, scorer=settings.scorer, count=settings.count)
