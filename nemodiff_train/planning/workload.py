"""The work of a training step: parameters, positions, allowed pairs, and the operations that they take."""

from dataclasses import dataclass

from megatron.bridge.peft.base import PEFT

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.precision import is_mixed, precision_of
from nemodiff_train.model.path_selector import CANDIDATES, HISTORY
from nemodiff_train.model.provider import TriModeModelProvider

MASKED_FRACTION = 0.5
"""Masked noisy positions over many samples; the noise level is uniform."""


@dataclass(frozen=True)
class Workload:
    """The sizes of a model and of its training sample; operations are counted as in docs/performance.md."""

    layers: int
    hidden: int
    query_channels: int
    """Query heads times head size."""
    key_channels: int
    """Key heads times head size; as many for values."""
    feed_forward: int
    gated: bool
    head_norms: bool
    vocabulary: int
    tied: bool
    """Whether embedding and output layer share one matrix."""
    length: int
    """L: clean tokens per sample."""
    views: int
    """Noisy views per sample; 0 in the AR stage."""
    block: int
    micro_batch: int
    global_batch: int
    mixed: bool
    """Whether weights and activations are in bf16; else in fp32."""
    sharded: bool
    """Whether the optimizer's state is sharded over the data-parallel ranks."""
    layer_adapters: int = 0
    """Parameters of a layer's adapters, which alone are trained unless a path selector is; 0 if all weights are."""
    drafts: bool = False
    """Whether a drafter is trained, whose loss compares the logits of both halves."""
    selector_rank: int = 0
    """Inner dimension of the path selector that alone is trained, on the layers' last states; 0 for none."""
    recompute_elementwise: bool = True
    """Whether the outputs of norms and of the gated activation are recomputed instead of kept."""

    @property
    def positions(self) -> int:
        """Return the positions per sample: (views + 1) L."""
        return (self.views + 1) * self.length

    @property
    def bytes_per_element(self) -> int:
        """Return the bytes per weight and per activation."""
        return 2 if self.mixed else 4

    @property
    def layer_matrices(self) -> int:
        """Return the parameters of a layer that multiply every position."""
        attention = 2 * self.hidden * (self.query_channels + self.key_channels)
        return attention + (3 if self.gated else 2) * self.hidden * self.feed_forward

    @property
    def layer_norms(self) -> int:
        """Return the parameters of a layer that every tensor-parallel rank has."""
        return 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Return the parameters of the embedding, and again of an output layer of its own."""
        return self.vocabulary * self.hidden

    @property
    def pairs(self) -> int:
        """Return the (query, key) pairs per sample that the attention rule allows; see docs/method.md."""
        clean = self.length * (self.length + 1) // 2
        noisy = self.length * self.block + self.length * (self.length - self.block) // 2
        return clean + self.views * noisy

    @property
    def selector(self) -> int:
        """Return the parameters of the path selector: a matrix per token before, one of states, one of candidates."""
        return (HISTORY + 2) * self.selector_rank * self.hidden

    @property
    def backward(self) -> bool:
        """Return whether gradients go through the layers."""
        return not self.selector_rank

    @property
    def flops_per_parameter(self) -> int:
        """Return the operations per parameter and position, forward and backward.

        Three products of two operations each, two if the parameter is frozen and has no gradient, or one if nothing
        goes backward.
        """
        return (4 if self.layer_adapters else 6) if self.backward else 2

    @property
    def matrix_flops(self) -> int:
        """Return the operations of all layers' matrices per sample, forward and backward."""
        matrices = self.flops_per_parameter * self.layer_matrices
        adapters = (6 if self.backward else 2) * self.layer_adapters
        return self.layers * (matrices + adapters) * self.positions

    @property
    def attention_flops(self) -> int:
        """Return the operations of all layers' attention per sample: 12 per pair and channel, 4 of them forward."""
        return (12 if self.backward else 4) * self.layers * self.query_channels * self.pairs

    @property
    def head_flops(self) -> float:
        """Return the operations of the output layer per sample, at the clean and the masked positions.

        A drafter takes as many: the logits of both halves forward, and those of the drafts backward.  A path selector
        adds its own, over the tokens before a masked position and its candidates.
        """
        masked = MASKED_FRACTION * self.views
        selector = 6 * (HISTORY + 1 + CANDIDATES) * self.selector_rank * self.hidden
        return self.length * (self.flops_per_parameter * self.embedding_parameters * (1 + masked) + selector * masked)

    @property
    def flops(self) -> float:
        """Return the operations per sample that training needs, nothing computed again: those that MFU counts."""
        return self.matrix_flops + self.attention_flops + self.head_flops


def workload_of(config: TriModeConfig) -> Workload:
    """Return the work of a run's training step."""
    model = config.model
    query_channels, key_channels = _head_channels(model)
    return Workload(
        layers=model.num_layers,
        hidden=model.hidden_size,
        query_channels=query_channels,
        key_channels=key_channels,
        feed_forward=model.ffn_hidden_size,
        gated=model.gated_linear_unit,
        head_norms=model.qk_layernorm,
        vocabulary=model.vocab_size,
        tied=model.share_embeddings_and_output_weights,
        length=config.dataset.seq_length,
        views=config.objective.noisy_views,
        block=config.objective.block_size,
        micro_batch=config.train.micro_batch_size,
        global_batch=config.train.global_batch_size,
        mixed=is_mixed(precision_of(config, cuda=True)),
        sharded=bool(config.optimizer.use_distributed_optimizer),
        layer_adapters=_layer_adapters(model, config.peft),
        drafts=config.drafter is not None,
        selector_rank=config.selector_rank,
        recompute_elementwise=model.recompute_elementwise,
    )


def _head_channels(model: TriModeModelProvider) -> tuple[int, int]:
    """Return the channels of all query heads, and of all key heads."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    return head * model.num_attention_heads, head * (model.num_query_groups or model.num_attention_heads)


def _layer_adapters(model: TriModeModelProvider, peft: PEFT | None) -> int:
    """Return the parameters of the two matrices beside each adapted linear layer."""
    if peft is None:
        return 0
    query_channels, key_channels = _head_channels(model)
    inner = (2 if model.gated_linear_unit else 1) * model.ffn_hidden_size
    # Inputs + outputs of each linear layer: A is [rank, inputs] and B is [outputs, rank].
    widths = {
        "linear_qkv": model.hidden_size + query_channels + 2 * key_channels,
        "linear_proj": query_channels + model.hidden_size,
        "linear_fc1": model.hidden_size + inner,
        "linear_fc2": model.ffn_hidden_size + model.hidden_size,
        # The same one by one, as a drafter's adapters have them.
        "linear_q": model.hidden_size + query_channels,
        "linear_k": model.hidden_size + key_channels,
        "linear_v": model.hidden_size + key_channels,
        "linear_fc1_gate": model.hidden_size + model.ffn_hidden_size,
        "linear_fc1_up": model.hidden_size + model.ffn_hidden_size,
    }
    return int(peft.dim * sum(width for name, width in widths.items() if name in peft.target_modules))
