"""The method: the doubled sample, the attention rule, the reduction of the losses."""

from nemodiff_train.objective.config import ObjectiveConfig

__all__ = ["ObjectiveConfig"]
