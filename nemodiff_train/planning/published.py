"""Runs of the published sizes that recipes are named after, planned without a checkpoint."""

from tempfile import TemporaryDirectory

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.published import SIZES
from nemodiff_train.config.recipes import load_recipe


def load_planned(recipe: str, settings: list[str]) -> TriModeConfig:
    """Return a run to plan; a recipe of a published size needs no model, data or output for it.

    Args:
        recipe: As :func:`~nemodiff_train.config.recipes.load_recipe` takes it.
        settings: Likewise, ``key=value``.
    """
    given = {word.partition("=")[0] for word in settings}
    family, _, rest = recipe.partition("_")
    size = SIZES.get(family, {}).get(rest.partition("_")[0])
    if size is None or "start_from" in given or not recipe.isidentifier():
        return load_recipe(recipe, settings)
    with TemporaryDirectory() as folder:
        size.config(family).save_pretrained(folder)
        assumed = {"start_from": folder, "data": "data", "output": "output"}
        more = [f"{name}={value}" for name, value in assumed.items() if name not in given]
        return load_recipe(recipe, [*settings, *more])
