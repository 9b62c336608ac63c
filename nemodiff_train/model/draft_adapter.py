"""Low-rank adapters on linear layers that act only on drafts."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from nemodiff_train.attention.state import AttentionState
from nemodiff_train.errors import UserError
from nemodiff_train.model.adapters import load_adapters
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.path_selector import LARGEST_RANK, PathSelector, SelectorTables
from nemodiff_train.objective.drafts import DRAFT_KINDS, DraftKind

if TYPE_CHECKING:
    from nemodiff_train.model.provider import TriModeModelProvider

PROJECTIONS = {
    "linear_q": "q_proj", "linear_k": "k_proj", "linear_v": "v_proj", "linear_proj": "o_proj",
    "linear_fc1_gate": "gate_proj", "linear_fc1_up": "up_proj", "linear_fc2": "down_proj",
}  # fmt: skip
"""Hugging Face's names of the linear layers that an adapter may act on, by those of Megatron Bridge."""

REMEDY = "name a drafter of this model, or train one with 'nemodiff train drafter'"

_WITHIN_LAYERS = ("kv_channels", "num_query_groups", "ffn_hidden_size")
"""Sizes that may be unset, to follow from the others; adapters of the attention output depend on the first alone."""


def adapted_layers(targets: str) -> list[str]:
    """Return the linear layers that ``targets`` stands for: ``all`` projections, or the attention output, ``o_proj``.

    Raises:
        UserError: It is neither.
    """
    if targets not in ("all", "o_proj"):
        raise UserError(f"targets={targets}; use all or o_proj")
    return list(PROJECTIONS) if targets == "all" else ["linear_proj"]


class DraftLinear(AdapterWrapper):
    """A linear layer with adapters that act on drafts.

    In training these are the noisy positions; with a cache, those of a draft forward.  Everything else is the layer's
    own output, so that what a model verifies and commits does not depend on its drafter.

    Args:
        to_wrap: The linear layer.
        adapter: Its adapter, or several where it is several projections in one: queries, keys and values, or gate
            and up.
    """

    state: AttentionState

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """Project [positions, batch, inputs].

        Returns:
            (output [positions, batch, outputs], bias or None).
        """
        out, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        correction = self.correction(normed, max(len(normed), len(out)))
        return (out if correction is None else out + correction), bias

    def correction(self, x: Tensor, positions: int) -> Tensor | None:
        """Return what the adapters add to the layer's output; None where nothing is drafted.

        Args:
            x: [positions, batch, inputs]; under sequence parallelism maybe this rank's part of the positions.
            positions: Number of positions of the forward.
        """
        # Indices of the drafted positions, then counted from this rank's first.
        first, end = self.state.draft_range(positions, self.to_wrap.config.noisy_views)
        if first == end:
            return None
        if len(x) < positions:
            offset = self.to_wrap.tp_group.rank() * len(x)
            first, end = (min(max(at - offset, 0), len(x)) for at in (first, end))
        if end - first < len(x):  # zeros, which stay zeros, because sequence parallelism needs equal parts
            x = nn.functional.pad(x[first:end], (0, 0, 0, 0, first, len(x) - end))
        # [positions, batch, outputs] of one adapter, or of several side by side.
        if not isinstance(self.adapter, nn.ModuleDict):
            correction: Tensor = self.adapter(x)
            return correction
        if "adapter_q" not in self.adapter:
            return torch.cat([self.adapter[f"adapter_{name}"](x) for name in ("gate", "up")], dim=-1)
        # Megatron has the queries of a key head, its key and its value one after another: [positions, batch, groups,
        # (queries + 2) * kv_channels], flattened.
        parts = [self.adapter[f"adapter_{name}"](x) for name in ("q", "k", "v")]
        groups = parts[1].shape[-1] // self.to_wrap.config.kv_channels
        return torch.cat([part.unflatten(-1, (groups, -1)) for part in parts], dim=-1).flatten(-2)


@dataclass
class DraftLoRA(CanonicalLoRA):
    """Bridge's LoRA on linear layers of every block, as :class:`DraftLinear`; all else is frozen.

    With a path selector, that alone is trained, and the adapters are frozen too.
    """

    target_modules: list[str] = field(default_factory=lambda: ["linear_proj"])
    """Some of :data:`PROJECTIONS`: the attention output alone, or all of them; none for a selector alone."""
    dim: int = 128
    alpha: int = 512
    selector_rank: int = 0
    """Rank of a :class:`~nemodiff_train.model.path_selector.PathSelector`; 0 for none."""
    drafter: str = ""
    """Checkpoint of the drafter whose adapters a selector's training starts from."""

    def __call__(
        self, model: MegatronModule | list[MegatronModule], training: bool = True
    ) -> MegatronModule | list[MegatronModule]:
        """Add adapters to a model, or to each of its chunks; B is zero, so that nothing changes yet."""
        adapted = super().__call__(model, training)
        for wrapped in adapted if isinstance(adapted, list) else [adapted]:
            chunk: GPTModel = unwrap_model(wrapped)
            for module in chunk.modules():
                if isinstance(module, DraftLinear):
                    module.state = chunk.attention_state
            if self.selector_rank:
                wrapped.requires_grad_(False)
            if self.selector_rank and chunk.post_process:  # the last stage, which has the output layer
                selector = PathSelector(chunk.config.hidden_size, self.selector_rank, next(chunk.parameters()))
                chunk.selector = selector.requires_grad_(training)
        return adapted

    @property
    def shape(self) -> list[str]:
        """Return the settings of a model that the sizes of the adapters follow from."""
        within = _WITHIN_LAYERS[: len(self.target_modules)]  # targets are none, the attention output, or all
        return ["num_layers", "hidden_size", "num_attention_heads", *within]

    def adapter_key_filter(self, key: str | tuple[str, Tensor]) -> bool:
        """Return whether a checkpoint of the drafter has a tensor."""
        of_selector = self.selector_rank > 0 and isinstance(key, str) and key.startswith("selector.")
        return of_selector or super().adapter_key_filter(key)

    def match(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        """Return which target a module is; Bridge takes no targets for all linear layers."""
        target: tuple[str, str] | None = super().match(m, name, prefix) if self.target_modules else None
        return target

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Return the module, or the :class:`DraftLinear` around it."""
        if isinstance(m, DraftLinear):
            return m
        adapted = super().transform(m, name, prefix)
        if not isinstance(adapted, AdapterWrapper):
            return adapted
        if "adapter_gate" in adapted.adapter._modules:
            for part in adapted.adapter.values():
                # By this name Bridge would store each of them as a gate and an up projection in one, whose halves
                # other tensor-parallel sizes then put together in another order.
                part.base_linear_name = part.base_linear_name.replace("linear_fc1", "linear")
        return DraftLinear(adapted.to_wrap, adapted.adapter)


@dataclass(frozen=True)
class Drafter:
    """Kind, adapter settings and block size of a drafter, as its checkpoint has them."""

    name: Literal["nemotron", "uno"]
    """Its kind's, in :data:`~nemodiff_train.objective.drafts.DRAFT_KINDS`."""
    lora: DraftLoRA
    block_size: int
    """Positions of the last blocks that it was trained on."""

    @property
    def kind(self) -> DraftKind:
        """Return the kind of its drafts."""
        return DRAFT_KINDS[self.name]


def open_drafter(checkpoint: Checkpoint, model: "TriModeModelProvider") -> Drafter:
    """Return a drafter's kind and the settings of its adapters.

    Args:
        checkpoint: The drafter's checkpoint.
        model: The configuration of the model that it drafts for.

    Raises:
        UserError: It is not a drafter, of a kind that is not known, or the drafter of a model of another shape or
            without what its kind needs.
    """
    run = checkpoint.require_drafter().run_config
    name = (run.get("drafter") or {}).get("kind")
    if name not in DRAFT_KINDS:
        raise UserError(
            f"the drafter '{checkpoint.path}' is of kind '{name}'; known: {', '.join(DRAFT_KINDS)}; {REMEDY}"
        )
    kind = DRAFT_KINDS[name]
    if not kind.uniform_noise and model.mask_token_id is None:
        raise UserError(
            f"the drafter '{checkpoint.path}' is of kind {name}, which drafts with a mask token, and the model has "
            "none; take a model after its joint stage"
        )
    adapters = run.get("peft")
    if adapters is None:
        raise UserError(f"'{checkpoint.iteration}' has no settings of its adapters; take another iteration")
    lora = DraftLoRA(
        dim=adapters["dim"],
        alpha=adapters["alpha"],
        target_modules=list(adapters["target_modules"]),
        selector_rank=adapters.get("selector_rank", 0),
    )
    for setting in (*lora.shape, *(("shift",) if kind.known_token_in_block else ())):
        expected, actual = run["model"].get(setting), getattr(model, setting)
        unset = setting in _WITHIN_LAYERS and None in (expected, actual)
        if expected != actual and not unset:
            raise UserError(
                f"the drafter '{checkpoint.path}' is for a model with {setting}={expected}; this one has {actual}; "
                f"{REMEDY}"
            )
    return Drafter(name, lora, run["model"]["block_size"])


def with_selector(model: "TriModeModelProvider", drafter: str | None, rank: int) -> Drafter:
    """Return a drafter with a path selector that is to be trained.

    Args:
        model: The configuration of the model.
        drafter: Checkpoint of a drafter; None for a tri-mode model's own drafts.
        rank: Rank of the selector.

    Raises:
        UserError: The rank is out of range, or as :func:`open_drafter`.
    """
    if not 1 <= rank <= LARGEST_RANK:
        raise UserError(f"rank={rank}; a path selector takes 1 to {LARGEST_RANK:,}")
    if drafter is None:
        return Drafter("nemotron", DraftLoRA(target_modules=[], selector_rank=rank), model.block_size)
    drafter_settings = open_drafter(Checkpoint.open(drafter), model)
    return replace(drafter_settings, lora=replace(drafter_settings.lora, selector_rank=rank, drafter=drafter))


def load_drafter(models: list[MegatronModule], checkpoint: Checkpoint, drafter: Drafter) -> None:
    """Add a drafter's adapters, and its path selector, to a model that is ready to decode.

    Args:
        models: This rank's chunks.
        checkpoint: The drafter's checkpoint, whose contents have been verified.
        drafter: Its kind and settings, from :func:`open_drafter`.
    """
    drafter.lora(models, training=False)
    load_adapters(models, checkpoint, drafter.lora)
    chunks: list[GPTModel] = [unwrap_model(chunk) for chunk in models]
    rank = drafter.lora.selector_rank
    tables = SelectorTables.from_model(chunks, rank) if rank else None
    for chunk in chunks:
        chunk.attention_state.draft_kind, chunk.selector_tables = drafter.kind, tables
