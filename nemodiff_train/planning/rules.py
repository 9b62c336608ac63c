"""Check a layout over processes: parallel sizes, batch, and the split of the layers into pipeline stages."""

from collections.abc import Iterator

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.errors import UserError
from nemodiff_train.model.provider import TriModeModelProvider

_ENDS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_COUNTED = {"account_for_embedding_in_pipeline_split": "embedding", "account_for_loss_in_pipeline_split": "loss"}
_CUSTOM = "pipeline_model_parallel_layout"


def problems(config: TriModeConfig, world_size: int) -> list[str]:
    """Return what is wrong with the layout and the batch, one line each.

    Args:
        config: The run; no size is below 1.
        world_size: Number of processes.
    """
    lines, chunks = [*_size_problems(config, world_size)], 1
    try:
        chunks = _model_chunks(config.model)
    except UserError as error:
        lines.append(str(error))
    return [*lines, *_batch_problems(config, world_size, chunks)]


def _size_problems(config: TriModeConfig, world_size: int) -> Iterator[str]:
    model, length = config.model, config.dataset.seq_length
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    if model.num_query_groups % tp:
        yield (
            f"model.tensor_model_parallel_size={tp} does not divide the model's {model.num_query_groups} "
            f"key-value heads; use a divisor of {model.num_query_groups}"
        )
    if model.sequence_parallel and tp == 1:
        yield "model.sequence_parallel=true takes a model.tensor_model_parallel_size of 2 or more; change one of them"
    positions = length * (config.objective.noisy_views + 1) // cp
    if model.sequence_parallel and positions % tp:
        yield (
            f"model.sequence_parallel=true: model.tensor_model_parallel_size={tp} does not divide the {positions} "
            f"positions of a sample on a rank (dataset.seq_length={length}); use a divisor of {positions}"
        )
    if cp > 1 and length % (2 * cp):
        yield (
            f"dataset.seq_length={length} cannot be cut into the {2 * cp} equal chunks of "
            f"model.context_parallel_size={cp}; use a multiple of {2 * cp}"
        )
    if cp > 1 and config.objective.reduction == "bridge":
        yield (
            f"objective.reduction=bridge divides each micro-batch by itself, which model.context_parallel_size={cp} "
            "splits; use another reduction, or a context parallel size of 1"
        )
    if world_size % (tp * pp * cp):
        yield (
            f"{world_size} processes were started, but the layout (tensor {tp} x pipeline {pp} x context {cp}) takes "
            f"a multiple of {tp * pp * cp}; start torchrun with --nproc-per-node {tp * pp * cp}"
        )


def _batch_problems(config: TriModeConfig, world_size: int, chunks: int) -> Iterator[str]:
    model, train = config.model, config.train
    pp = model.pipeline_model_parallel_size
    replicas = max(1, world_size // (model.tensor_model_parallel_size * pp * model.context_parallel_size))
    samples = train.micro_batch_size * replicas
    if train.global_batch_size % samples:
        yield (
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {replicas} data-parallel replicas; make it a multiple of {samples}"
        )
        return
    micro_batches = train.global_batch_size // samples
    group = model.microbatch_group_size_per_vp_stage or pp
    rest = micro_batches % group
    # What Megatron's interleaved schedule can run.
    if chunks > 1 and not (pp <= group <= micro_batches and (rest == 0 or rest >= pp)):
        yield (
            f"virtual pipeline stages take micro-batches {group} at a time, but a step has {micro_batches} of them; "
            f"make train.global_batch_size a multiple of {samples * group}"
        )


def _model_chunks(model: TriModeModelProvider) -> int:
    """Return the number of model chunks per process: its virtual pipeline stages."""
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    ends, counted = _set_fields(model, _ENDS), _set_fields(model, tuple(_COUNTED))
    custom = _set_fields(model, (_CUSTOM,))
    ways = [f"model.{names[0]}" for names in (ends, counted, custom) if names]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} are different ways to split the layers; use one of them")
    if pp == 1 and (ways or vpp):
        name = ways[0] if ways else "model.virtual_pipeline_model_parallel_size"
        raise UserError(f"{name} takes a model.pipeline_model_parallel_size of 2 or more; change one of them")
    if vpp is not None and vpp < 2:
        raise UserError(f"model.virtual_pipeline_model_parallel_size={vpp}: use 2 or more, or leave it unset")
    if custom:
        return _custom_chunks(model)
    note = f" ({' and '.join(_COUNTED[name] for name in counted)} counted)" if counted else ""
    if ends:
        stages = _uneven_stages(model, ends)
    else:
        layers = model.num_layers + len(counted)
        stages = [layers // pp]
        if layers % pp:
            raise UserError(
                f"model.pipeline_model_parallel_size={pp} does not divide the model's {layers} layers{note}; use "
                f"a divisor of {layers}, or an uneven split by model.{_ENDS[0]} and model.{_ENDS[1]}"
            )
    indivisible = next((layers for layers in stages if vpp and layers % vpp), None)
    if indivisible is not None:
        raise UserError(
            f"model.virtual_pipeline_model_parallel_size={vpp} does not divide the {indivisible} layers of a stage"
            f"{note}; use a divisor of {indivisible}"
        )
    return vpp or 1


def _set_fields(model: TriModeModelProvider, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(model, name) is not None and getattr(model, name) is not False]


def _uneven_stages(model: TriModeModelProvider, ends: list[str]) -> list[int]:
    """Return the layers of the stages where the first or the last has a number of its own."""
    outer = [getattr(model, name) for name in ends]
    words = ", ".join(f"model.{name}={layers}" for name, layers in zip(ends, outer, strict=True))
    left, stages = model.num_layers - sum(outer), model.pipeline_model_parallel_size - len(ends)
    if min(outer) < 1:
        raise UserError(f"{words}: every stage takes a layer or more; use 1 or more")
    if left < stages or (left % stages if stages else left):
        raise UserError(
            f"{words} leaves {left} of {model.num_layers} layers for the other stages, of which there are {stages}; "
            f"make it {f'a positive multiple of {stages}' if stages else 0}"
        )
    return [*outer, *([left // stages] if stages else [])]


def _custom_chunks(model: TriModeModelProvider) -> int:
    """Return the model chunks per process of a layout such as ``Ett|ttttL``, as Megatron reads it."""
    custom, vpp = model.pipeline_model_parallel_layout, model.virtual_pipeline_model_parallel_size
    setting = f"model.{_CUSTOM}={custom}"
    try:
        layout = PipelineParallelLayerLayout(custom, model.pipeline_model_parallel_size)
        layers = layout.flatten_layout.count(LayerType.decoder)
        if layers != model.num_layers:
            raise UserError(
                f"{setting} has {layers} layers, but the model has {model.num_layers}; change one of them"
            )
        layout.validate_layer_layout(layers, None)
    except (AssertionError, NotImplementedError) as error:
        raise UserError(f"{setting}: {str(error).splitlines()[0]}") from None
    chunks = int(layout.virtual_pipeline_model_parallel_size)
    if vpp not in (None, chunks):
        raise UserError(
            f"{setting} has {chunks} virtual stages, but model.virtual_pipeline_model_parallel_size={vpp}; change "
            "one of them"
        )
    return chunks
