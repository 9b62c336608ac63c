"""Check what a run writes: its folder, and the evaluation in the training loop."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.run import EvaluationConfig
from nemodiff_train.decoding.decode import MODES
from nemodiff_train.errors import nearest, refusal
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


def problems(config: TriModeConfig) -> Iterator[str]:
    """Yield what is wrong with the output folder and the evaluation in the loop, one line each."""
    folders = [Path(config.checkpoint.save)] if config.checkpoint.save else []
    if not folders:
        yield "checkpoint.save is not set; name the folder for the checkpoints"
    for key in _WRITTEN:
        section, _, name = key.partition(".")
        if path := getattr(getattr(config, section), name, None):
            folders.append(Path(path).parent)
    for folder in folders:
        yield from refusal(partial(check_can_be_made, folder))
    yield from _evaluation_problems(config.evaluation)


def _evaluation_problems(settings: EvaluationConfig) -> Iterator[str]:
    if not settings.interval:
        return
    if unknown := next((mode for mode in settings.modes if mode not in MODES), None):
        yield f"evaluation.modes has '{unknown}'; known: {', '.join(MODES)}.{nearest(unknown, MODES)}"
    else:
        yield from refusal(partial(load_task, settings.task, scorer=settings.scorer, count=settings.count))
