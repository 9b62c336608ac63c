"""Memory of the GPU that holds most, by what takes it."""

from dataclasses import dataclass

from nemodiff_train.model.head import LOGIT_CHUNK
from nemodiff_train.planning.layouts import Layout
from nemodiff_train.planning.workload import Workload


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    """The output layer's part: a chunk of logits, and the gradients that are made with them."""

    @property
    def total(self) -> float:
        """Bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def memory_of(work: Workload, layout: Layout, device: str = "cuda") -> Memory:
    """Memory of the first or the last pipeline stage, whichever needs more.

    Args:
        device: ``cuda`` or ``cpu``, which decides how many places have logits at once.
    """
    stages = (True,) if layout.pipeline == 1 else (False, True)
    return max(
        (_of_stage(work, layout, last, LOGIT_CHUNK[device]) for last in stages), key=lambda memory: memory.total
    )


def stage_parameters(work: Workload, layout: Layout, last: bool) -> float:
    """Parameters on one GPU of the first or the last stage."""
    tables = 2 if layout.pipeline == 1 and not work.tied else 1
    layers = work.layers / layout.pipeline * (work.layer_matrices / layout.tensor + work.layer_norms)
    return layers + tables * work.table / layout.tensor + (work.hidden if last else 0)


def trained_parameters(work: Workload, layout: Layout, last: bool) -> float:
    """Those of them that have gradients and optimizer state: all, or adapters, which come on top."""
    if work.layer_adapters:
        return work.layers / layout.pipeline * work.layer_adapters / layout.tensor
    return stage_parameters(work, layout, last)


def _of_stage(work: Workload, layout: Layout, last: bool, rows: int) -> Memory:
    trained = trained_parameters(work, layout, last)
    shards = layout.data * layout.context if work.sharded else 1
    in_flight = 1 if last else min(layout.pipeline, layout.micro_batches)
    return Memory(
        weights=work.width * (stage_parameters(work, layout, last) + (trained if work.layer_adapters else 0)),
        gradients=4 * trained,
        optimizer=(12 if work.mixed else 8) * trained / shards,
        activations=_activations(work, layout, in_flight),
        logits=_logits(work, layout, rows) if last else 0.0,
    )


def _activations(work: Workload, layout: Layout, in_flight: int) -> float:
    """What the backward pass needs, of every micro-batch that the stage has begun (1F1B), and a layer's own peak."""
    layers, whole = work.layers / layout.pipeline, _saved_by_layer(work, layout)
    positions = work.micro_batch * work.positions / layout.context
    state = positions * work.hidden * work.width / (layout.tensor if layout.sequence else 1)
    working = positions * work.width * (3 * work.feed_forward / layout.tensor + 2 * work.hidden)
    kept = state if layout.recompute else whole
    return in_flight * (layers * kept + 2 * state) + working + (whole if layout.recompute else 0)


def _saved_by_layer(work: Workload, layout: Layout) -> float:
    """Bytes that one layer keeps of one micro-batch; after Korthikanti et al. 2022 (arXiv 2205.05198), section 4.

    Without dropout and scores: both norms' inputs and outputs; queries, keys and values, once more before norms of
    heads; the attention's output; and the feed-forward's two products.  The norms' outputs and a gated
    activation's may be made again instead.  Of clean keys and values a context-parallel rank keeps those of the
    whole sample.
    """
    own = work.positions / layout.context
    # Of a frozen matrix, autograd does not keep what it multiplies.
    dropped = work.remade or work.layer_adapters
    shared = (2 if dropped else 4) * work.hidden / (layout.tensor if layout.sequence else 1)
    before_norms = work.queries + work.keys if work.head_norms else 0
    inner = (2 if dropped else 3) if work.gated else 2
    split = 2 * work.queries + before_norms + inner * work.feed_forward
    keys = 2 * work.keys * (own + work.length * (1 - 1 / layout.context))
    return work.micro_batch * work.width * (own * (shared + split / layout.tensor) + keys / layout.tensor)


def _logits(work: Workload, layout: Layout, rows: int) -> float:
    """The output layer and its loss where every noisy place is masked; see nemodiff_train/model/head.py."""
    states = 2 * work.micro_batch * work.positions / layout.context * work.hidden * work.width
    if work.drafts:
        # Logits of drafts and verifiers, their distributions and the drafts' gradient, of all tokens in fp32.
        return states + 6 * 4 * rows * work.vocabulary
    chunk = rows * work.vocabulary / layout.tensor
    # Its gradient, kept, and scaled into another; of a frozen table there is none.
    table = 0 if work.layer_adapters else work.table / layout.tensor * (4 + 4 + work.width)
    return states + chunk * (4 + work.width) + table
