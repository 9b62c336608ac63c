"""Low-rank adapters on the attention outputs that act on drafts alone."""

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from nemodiff_train.attention.state import AttentionState
from nemodiff_train.errors import UserError
from nemodiff_train.model.adapters import load_adapters
from nemodiff_train.model.checkpoint import Checkpoint


class DraftProjection(LoRALinear):
    """An attention's output projection, with an adapter for what is drafted.

    In training that is the noisy half; with a cache, the draft pass.  All else is the projection's own output, so
    that what a model verifies and commits does not depend on its drafter.
    """

    state: AttentionState

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Project [positions, batch, heads * head_dim / tensor-parallel size]; returns (output, bias)."""
        out, bias, _ = self.base_linear_forward(x, *args, **kwargs)
        correction = self.correction(x)
        return (out if correction is None else out + correction), bias

    def correction(self, x: Tensor) -> Tensor | None:
        """What the adapter adds to the projection's output; None where nothing is drafted."""
        drafted = self.state.drafted(len(x), self.to_wrap.config.noisy_views)
        if not drafted:
            return None
        if drafted < len(x):  # zeros stay zeros; cutting them off would break the shares of sequence parallelism
            x = nn.functional.pad(x[:drafted], (0, 0, 0, 0, 0, len(x) - drafted))
        added: Tensor = self.adapter(x)
        return added


@dataclass
class DraftLoRA(LoRA):
    """Bridge's LoRA on every attention output projection, as :class:`DraftProjection`; the rest is frozen."""

    target_modules: list[str] = field(default_factory=lambda: ["linear_proj"])
    dim: int = 128
    alpha: int = 512

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Give a model, or each of its chunks, its adapters; B is zero, so that nothing changes yet."""
        made = super().__call__(model, training)
        for chunk in made if isinstance(made, list) else [made]:
            for module in chunk.modules():
                if isinstance(module, DraftProjection):
                    module.state = unwrap_model(chunk).attention_state
        return made

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """The module, or the :class:`DraftProjection` around it."""
        made = super().transform(module, name, prefix)
        return DraftProjection(made.to_wrap, made.adapter) if type(made) is LoRALinear else made


def open_drafter(checkpoint: Checkpoint, model: Any) -> DraftLoRA:
    """The adapters that a drafter's checkpoint describes, without their weights.

    Args:
        checkpoint: The drafter's.
        model: The ``TriModeModelProvider`` of the model that it is for.

    Raises:
        UserError: It is no drafter, or one of a model of another shape.
    """
    run = checkpoint.require_drafter().run_config
    for name in ("num_layers", "hidden_size", "num_attention_heads", "shift"):
        theirs, ours = run["model"][name], getattr(model, name)
        if theirs != ours:
            raise UserError(
                f"the drafter '{checkpoint.path}' is of a model with {name}={theirs}; this one has {ours}"
            )
    return DraftLoRA(dim=run["peft"]["dim"], alpha=run["peft"]["alpha"])


def load_drafter(models: list[Any], checkpoint: Checkpoint, lora: DraftLoRA) -> None:
    """Put a drafter's adapters into a model that is ready to decode.

    Args:
        models: This rank's chunks.
        checkpoint: The drafter's.
        lora: What :func:`open_drafter` returned for it.
    """
    lora(models, training=False)
    load_adapters(models, checkpoint.verify_contents(), lora)
