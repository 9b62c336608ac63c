"""Low-rank adapters on the attention outputs that act only on drafts."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from nemodiff_train.attention.state import AttentionState
from nemodiff_train.errors import UserError
from nemodiff_train.model.adapters import load_adapters
from nemodiff_train.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from nemodiff_train.model.provider import TriModeModelProvider


class DraftProjection(LoRALinear):
    """An attention's output projection, with an adapter that acts on drafts.

    In training these are the noisy positions; with a cache, a draft forward. Everything else is the projection's own
    output, so that what a model verifies and commits does not depend on its drafter.
    """

    state: AttentionState

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Project [positions, batch, heads * head_dim / tensor-parallel size].

        Returns:
            (output [positions, batch, hidden], bias or None).
        """
        out, bias, _ = self.base_linear_forward(x, *args, **kwargs)
        correction = self.correction(x)
        return (out if correction is None else out + correction), bias

    def correction(self, x: Tensor) -> Tensor | None:
        """Return what the adapter adds to the projection's output; None where nothing is drafted."""
        drafted = self.state.drafted(len(x), self.to_wrap.config.noisy_views)
        if not drafted:
            return None
        if drafted < len(x):  # zeros, which stay zeros, because sequence parallelism needs equal parts
            x = nn.functional.pad(x[:drafted], (0, 0, 0, 0, 0, len(x) - drafted))
        correction: Tensor = self.adapter(x)
        return correction


@dataclass
class DraftLoRA(LoRA):
    """Bridge's LoRA on every attention output projection, as :class:`DraftProjection`; all else is frozen."""

    target_modules: list[str] = field(default_factory=lambda: ["linear_proj"])
    dim: int = 128
    alpha: int = 512

    def __call__(
        self, model: MegatronModule | list[MegatronModule], training: bool = True
    ) -> MegatronModule | list[MegatronModule]:
        """Add adapters to a model, or to each of its chunks; B is zero, so that nothing changes yet."""
        adapted = super().__call__(model, training)
        for chunk in adapted if isinstance(adapted, list) else [adapted]:
            for module in chunk.modules():
                if isinstance(module, DraftProjection):
                    module.state = unwrap_model(chunk).attention_state
        return adapted

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Return the module, or the :class:`DraftProjection` around it."""
        adapted = super().transform(module, name, prefix)
        return DraftProjection(adapted.to_wrap, adapted.adapter) if type(adapted) is LoRALinear else adapted


def open_drafter(checkpoint: Checkpoint, model: "TriModeModelProvider") -> DraftLoRA:
    """Return the settings of a drafter's adapters.

    Args:
        checkpoint: The drafter's checkpoint.
        model: The configuration of the model that it drafts for.

    Raises:
        UserError: It is not a drafter, or the drafter of a model of another shape.
    """
    run = checkpoint.require_drafter().run_config
    for name in ("num_layers", "hidden_size", "num_attention_heads", "shift"):
        expected, actual = run["model"].get(name), getattr(model, name)
        if expected != actual:
            raise UserError(
                f"the drafter '{checkpoint.path}' is for a model with {name}={expected}; this one has {actual}"
            )
    adapters = run.get("peft")
    if adapters is None:
        raise UserError(f"'{checkpoint.iteration}' has no settings of its adapters; take another iteration")
    return DraftLoRA(dim=adapters["dim"], alpha=adapters["alpha"])


def load_drafter(models: list[MegatronModule], checkpoint: Checkpoint, lora: DraftLoRA) -> None:
    """Add a drafter's adapters to a model that is ready to decode.

    Args:
        models: This rank's chunks.
        checkpoint: The drafter's checkpoint.
        lora: What :func:`open_drafter` returned for it.
    """
    lora(models, training=False)
    load_adapters(models, checkpoint.verify_contents(), lora)
