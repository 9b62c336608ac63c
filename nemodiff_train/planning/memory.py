"""Memory of one GPU by what takes it; ``nemodiff plan`` and the dry run share it."""

from dataclasses import dataclass

from nemodiff_train.model.head import DRAFT_CHUNK, LOGIT_CHUNK
from nemodiff_train.planning.layouts import Layout
from nemodiff_train.planning.workload import Workload


def optimizer_bytes(mixed: bool) -> int:
    """Return the bytes per trained parameter: Adam's two moments and, with mixed precision, the weight in fp32."""
    return 12 if mixed else 8


@dataclass(frozen=True)
class Stage:
    """Layers and parameters on one GPU of a pipeline stage, counted or estimated."""

    index: int
    """Position in the pipeline, from 0."""
    layers: float
    parameters: float
    """Parameters, adapters included."""
    trained: float
    """Parameters with gradients and optimizer state: all, or the adapters alone."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    """Output layer: a chunk of logits, and the gradients that are computed with it."""

    @property
    def total(self) -> float:
        """Return the sum in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def memory_of(work: Workload, layout: Layout, device: str = "cuda") -> Memory:
    """Return the memory of the first or the last pipeline stage, whichever needs more.

    Args:
        work: Sizes of the model and its sample.
        layout: Sizes of the parallel groups.
        device: ``cuda`` or ``cpu``, which decides how many positions have logits at once; on a GPU, Transformer
            Engine is assumed.
    """
    stages = {0, layout.pipeline - 1}
    candidates = (stage_memory(work, layout, estimated_stage(work, layout, index), device) for index in stages)
    return max(candidates, key=lambda memory: memory.total)


def estimated_stage(work: Workload, layout: Layout, index: int) -> Stage:
    """Return what one GPU of a stage holds, from the sizes of the model; head norms are left out."""
    layers, last = work.layers / layout.pipeline, index == layout.pipeline - 1
    tables = (index == 0) + (last and not (work.tied and layout.pipeline == 1))
    model = layers * (work.layer_matrices / layout.tensor + work.layer_norms)
    model += tables * work.embedding_parameters / layout.tensor + (work.hidden if last else 0)
    adapters = layers * work.layer_adapters / layout.tensor
    selector = work.selector if last else 0
    trained = selector if work.selector_rank else adapters or model
    return Stage(index, layers, model + adapters + selector, trained)


def stage_memory(work: Workload, layout: Layout, stage: Stage, device: str = "cuda") -> Memory:
    """Return the memory of one GPU of a stage.

    Args:
        work: Sizes of the model and its sample.
        layout: Sizes of the parallel groups.
        stage: What the GPU holds.
        device: ``cuda`` or ``cpu``, which decides how many positions have logits at once; on a GPU, Transformer
            Engine is assumed.
    """
    shards = layout.data * layout.context if work.sharded else 1
    last = stage.index == layout.pipeline - 1
    return Memory(
        weights=work.bytes_per_element * stage.parameters,
        gradients=4 * stage.trained,  # in fp32
        optimizer=optimizer_bytes(work.mixed) * stage.trained / shards,
        activations=_activations(work, layout, stage, device),
        logits=_logits(work, layout, device) if last else 0.0,
    )


def _activations(work: Workload, layout: Layout, stage: Stage, device: str) -> float:
    """Return what the backward pass needs of every micro-batch in flight (1F1B), and the peak inside one layer."""
    in_flight = min(layout.pipeline - stage.index, layout.micro_batches)
    positions = work.micro_batch * work.positions / layout.context
    # Bytes of a layer's input, of all that one layer saves, and of its temporaries in the backward pass.
    hidden = positions * work.hidden * work.bytes_per_element / layout.tensor
    saved_by_layer = _saved_by_layer(work, layout, device)
    temporaries = positions * work.bytes_per_element * (3 * work.feed_forward / layout.tensor + 2 * work.hidden)
    if not work.backward:
        return in_flight * 2 * hidden + temporaries + saved_by_layer
    if layout.recompute:
        return in_flight * (stage.layers * hidden + 2 * hidden) + temporaries + saved_by_layer
    return in_flight * (stage.layers * saved_by_layer + 2 * hidden) + temporaries


def _saved_by_layer(work: Workload, layout: Layout, device: str) -> float:
    """Return the bytes that one layer saves per micro-batch; after Korthikanti et al. (2205.05198), section 4.

    Without dropout and scores: inputs and outputs of both norms; the projection to queries, keys and values, of which
    the values are a view; rotated queries and keys; queries before head norms; the output of attention, on a CPU in
    two orders; and the two products of the feed-forward layer.  The outputs of norms and of a gated activation may
    be recomputed instead, but for those of norms inside Transformer Engine's linear layers, and under full
    recomputation, which holds one layer at a time.  A context-parallel rank keeps copies of its keys and values, with
    the clean ones of the whole sample.
    """
    positions = work.positions / layout.context
    # Autograd does not save the input of a frozen matrix.
    dropped = (work.recompute_elementwise and not layout.recompute) or work.layer_adapters
    norms = 2 if work.layer_adapters or (dropped and device != "cuda") else 4
    # Elements per position: over the hidden size, and over the sizes that tensor parallelism splits.
    shared = norms * work.hidden / layout.tensor
    unsharded = layout.context == 1
    projected = work.query_channels + 2 * work.key_channels if unsharded or work.head_norms else 0
    inner = (2 if dropped else 3) if work.gated else 2
    queries = 2 + (1 if work.head_norms else 0) + (1 if device == "cpu" else 0)
    split = projected + queries * work.query_channels + inner * work.feed_forward
    keys = work.key_channels * (positions if unsharded else 2 * (positions + work.length * (1 - 1 / layout.context)))
    elements = positions * (shared + split / layout.tensor) + keys / layout.tensor
    return work.micro_batch * work.bytes_per_element * elements


def _logits(work: Workload, layout: Layout, device: str) -> float:
    """Return the bytes of the output layer and its loss if every noisy position is masked; see model/head.py."""
    states = 2 * work.micro_batch * work.positions / layout.context * work.hidden * work.bytes_per_element
    if work.drafts:
        # Logits of drafts and verifiers, their distributions and the drafts' gradient, of all tokens in fp32.
        return states + 6 * 4 * DRAFT_CHUNK[device] * work.vocabulary
    chunk = LOGIT_CHUNK[device] * work.vocabulary / layout.tensor
    # The gradient of the weight, accumulated in fp32 and scaled into another; a frozen weight has none.
    size = work.bytes_per_element
    weight = 0 if work.layer_adapters else work.embedding_parameters / layout.tensor * (4 + 4 + size)
    return states + chunk * (4 + size) + weight
