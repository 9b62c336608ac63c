"""The work of a training step: parameters, positions, allowed pairs, and the operations that they take."""

from dataclasses import dataclass
from typing import Any

from nemodiff_train.config.config import TriModeConfig

MASKED_SHARE = 0.5
"""Of the noisy places, over many samples; the noise level is uniform."""


@dataclass(frozen=True)
class Workload:
    """The sizes of a model and of its training sample; operations are as in docs/performance.md."""

    layers: int
    hidden: int
    queries: int
    """Heads times head size."""
    keys: int
    """Key heads times head size; values are as many."""
    feed_forward: int
    gated: bool
    head_norms: bool
    vocabulary: int
    tied: bool
    """Whether embedding and output layer are one matrix."""
    length: int
    """L: clean tokens of a sample."""
    views: int
    """Noisy halves; 0 in the AR stage."""
    block: int
    micro_batch: int
    global_batch: int
    mixed: bool
    """Weights and activations in bf16; else in fp32."""
    sharded: bool
    """Whether data-parallel ranks share the optimizer's state."""
    layer_adapters: int = 0
    """Parameters of a layer's adapters, which alone are trained; 0 where all weights are."""
    drafts: bool = False
    """Whether the adapters are a drafter's, whose loss compares the logits of both halves."""
    remade: bool = True
    """Whether the outputs of norms and of the gated activation are made again instead of kept."""

    @property
    def positions(self) -> int:
        """Positions of a sample: (views + 1) L."""
        return (self.views + 1) * self.length

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.mixed else 4

    @property
    def layer_matrices(self) -> int:
        """Parameters of a layer that multiply every position."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        return attention + (3 if self.gated else 2) * self.hidden * self.feed_forward

    @property
    def layer_norms(self) -> int:
        """Parameters of a layer that every tensor-parallel rank has."""
        return 2 * self.hidden

    @property
    def table(self) -> int:
        """Parameters of the embedding, and again of an output layer of its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model, but for the norms of heads."""
        layers = self.layers * (self.layer_matrices + self.layer_norms)
        return layers + self.hidden + self.table * (1 if self.tied else 2)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the attention rule allows in a sample; see docs/method.md."""
        clean = self.length * (self.length + 1) // 2
        noisy = self.length * self.block + self.length * (self.length - self.block) // 2
        return clean + self.views * noisy

    @property
    def products(self) -> int:
        """Operations a parameter and position, forward and backward: three products, without its gradient two."""
        return 4 if self.layer_adapters else 6

    @property
    def matrix_flops(self) -> int:
        """Of all layers on one sample, forward and backward."""
        own = self.products * self.layer_matrices + 6 * self.layer_adapters
        return self.layers * own * self.positions

    @property
    def attention_flops(self) -> int:
        """Of all layers on one sample, forward and backward: 12 a pair and query channel."""
        return 12 * self.layers * self.queries * self.pairs

    @property
    def head_flops(self) -> float:
        """Of the output layer, at the places that carry loss: all clean ones and the masked ones.

        As many for a drafter, which takes the logits of both halves forward, and those of the drafts backward.
        """
        return self.products * self.table * self.length * (1 + MASKED_SHARE * self.views)


def workload_of(config: TriModeConfig) -> Workload:
    """What a recipe's step consists of."""
    model = config.model
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    return Workload(
        layers=model.num_layers,
        hidden=model.hidden_size,
        queries=head * model.num_attention_heads,
        keys=head * (model.num_query_groups or model.num_attention_heads),
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
        mixed=config.mixed_precision is not None,
        sharded=bool(config.optimizer.use_distributed_optimizer),
        layer_adapters=_layer_adapters(model, config.peft, head),
        drafts=config.drafter is not None,
        remade=model.recompute_elementwise,
    )


def _layer_adapters(model: Any, peft: Any, head: int) -> int:
    """Parameters of the two matrices beside each linear layer that is adapted."""
    if peft is None:
        return 0
    queries, keys = head * model.num_attention_heads, head * (model.num_query_groups or model.num_attention_heads)
    inner = (2 if model.gated_linear_unit else 1) * model.ffn_hidden_size
    widths = {
        "linear_qkv": model.hidden_size + queries + 2 * keys,
        "linear_proj": queries + model.hidden_size,
        "linear_fc1": model.hidden_size + inner,
        "linear_fc2": model.ffn_hidden_size + model.hidden_size,
    }
    return int(peft.dim * sum(width for name, width in widths.items() if name in peft.target_modules))
