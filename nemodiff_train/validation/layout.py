"""Layouts over processes that cannot run, found before anything is built."""

from dataclasses import dataclass
from typing import Any

from nemodiff_train.config.config import TriModeConfig


def layout_problems(config: TriModeConfig, world_size: int) -> list[str]:
    """What is wrong with the layout and the batch, a line each; nothing if Megatron can run them."""
    model = config.model
    found = [*_tensor_problems(config), *_context_problems(config), *_process_problems(model, world_size)]
    stages = _split_into_stages(model)
    return [*found, *stages.problems, *_batch_problems(config, world_size, stages.chunks)]


def _tensor_problems(config: TriModeConfig) -> list[str]:
    model, tp = config.model, config.model.tensor_model_parallel_size
    found = []
    if model.num_query_groups % tp:
        found.append(
            f"model.tensor_model_parallel_size={tp} does not divide the model's {model.num_query_groups} "
            f"key-value heads; use a divisor of {model.num_query_groups}"
        )
    if model.sequence_parallel and tp == 1:
        found.append("model.sequence_parallel=true takes a model.tensor_model_parallel_size of 2 or more")
    positions = config.dataset.seq_length * (config.objective.noisy_views + 1) // model.context_parallel_size
    if model.sequence_parallel and positions % tp:
        found.append(
            f"model.sequence_parallel=true: model.tensor_model_parallel_size={tp} does not divide the {positions} "
            f"positions of a sample on a rank (dataset.seq_length={config.dataset.seq_length})"
        )
    return found


def _context_problems(config: TriModeConfig) -> list[str]:
    length, cp = config.dataset.seq_length, config.model.context_parallel_size
    if cp == 1:
        return []
    found = []
    if length % (2 * cp):
        found.append(
            f"dataset.seq_length={length} cannot be cut into the {2 * cp} equal chunks of "
            f"model.context_parallel_size={cp}; use a multiple of {2 * cp}"
        )
    if config.objective.reduction == "bridge":
        found.append(
            f"objective.reduction=bridge divides each micro-batch by itself, which model.context_parallel_size={cp} "
            "splits; use another reduction, or a context parallel size of 1"
        )
    return found


def _process_problems(model: Any, world_size: int) -> list[str]:
    tp, pp, cp = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    if world_size % (tp * pp * cp) == 0:
        return []
    return [
        f"{world_size} processes were started, but the layout (tensor {tp} x pipeline {pp} x context {cp}) takes a "
        f"multiple of {tp * pp * cp}; start torchrun with --nproc-per-node {tp * pp * cp}"
    ]


def _batch_problems(config: TriModeConfig, world_size: int, chunks: int) -> list[str]:
    model, train = config.model, config.train
    pp = model.pipeline_model_parallel_size
    replicas = max(1, world_size // (model.tensor_model_parallel_size * pp * model.context_parallel_size))
    at_once = train.micro_batch_size * replicas
    if train.global_batch_size % at_once:
        return [
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {replicas} data-parallel replicas"
        ]
    micro_batches = train.global_batch_size // at_once
    group = model.microbatch_group_size_per_vp_stage or pp
    if chunks > 1 and not _fill_the_pipeline(micro_batches, group, pp):
        return [
            f"virtual pipeline stages take micro-batches {group} at a time, but a step has {micro_batches} of them; "
            f"make train.global_batch_size a multiple of {at_once * group}"
        ]
    return []


def _fill_the_pipeline(micro_batches: int, group: int, pp: int) -> bool:
    """Megatron's condition on interleaved schedules."""
    rest = micro_batches % group
    return pp <= group <= micro_batches and (rest == 0 or rest >= pp)


@dataclass(frozen=True)
class _Stages:
    """How the layers fall to the pipeline stages."""

    chunks: int = 1
    """Model chunks of a process: virtual stages."""
    problems: tuple[str, ...] = ()


ENDS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
SHARES = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
DRAWN = ("pipeline_model_parallel_layout",)


def _split_into_stages(model: Any) -> _Stages:
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    ways = [name for kind in (ENDS, SHARES, DRAWN) if (name := _first_set(model, kind))]
    if len(ways) > 1:
        return _Stages(problems=(f"{' and '.join(ways)} are different ways to split the layers; use one of them",))
    if pp == 1 and (ways or vpp):
        name = ways[0] if ways else "model.virtual_pipeline_model_parallel_size"
        return _Stages(problems=(f"{name} takes a model.pipeline_model_parallel_size of 2 or more",))
    if vpp is not None and vpp < 2:
        return _Stages(
            problems=(f"model.virtual_pipeline_model_parallel_size={vpp}: use 2 or more, or leave it unset",)
        )
    if model.pipeline_model_parallel_layout is not None:
        return _drawn_stages(model)
    shares = _end_shares(model) if ways and ways[0].removeprefix("model.") in ENDS else _even_shares(model)
    if isinstance(shares, str):
        return _Stages(problems=(shares,))
    uneven = next((share for share in shares if vpp and share % vpp), None)
    if uneven is not None:
        line = f"model.virtual_pipeline_model_parallel_size={vpp} does not divide the {uneven} layers of a stage"
        return _Stages(problems=(line + _counted(model),))
    return _Stages(chunks=vpp or 1)


def _first_set(model: Any, names: tuple[str, ...]) -> str | None:
    given = (name for name in names if getattr(model, name) is not None and getattr(model, name) is not False)
    return next((f"model.{name}" for name in given), None)


def _counted(model: Any) -> str:
    """What counts as a layer besides the layers, for a message."""
    added = [what for what, name in zip(("embedding", "loss"), SHARES, strict=True) if getattr(model, name)]
    return f" ({' and '.join(added)} counted)" if added else ""


def _even_shares(model: Any) -> list[int] | str:
    """Layers of the stages where all take the same share, or what is wrong with that."""
    pp = model.pipeline_model_parallel_size
    layers = model.num_layers + sum(getattr(model, name) for name in SHARES)
    if layers % pp:
        return (
            f"model.pipeline_model_parallel_size={pp} does not divide the model's {layers} layers{_counted(model)}; "
            f"model.{ENDS[0]} and model.{ENDS[1]} make an uneven split"
        )
    return [layers // pp]


def _end_shares(model: Any) -> list[int] | str:
    """Layers of the stages where the first or last has a share of its own, or what is wrong with that."""
    given = {f"model.{name}": getattr(model, name) for name in ENDS if getattr(model, name) is not None}
    words = ", ".join(f"{name}={layers}" for name, layers in given.items())
    left, stages = model.num_layers - sum(given.values()), model.pipeline_model_parallel_size - len(given)
    if min(given.values()) < 1:
        return f"{words}: every stage takes a layer or more"
    if left < stages or (left % stages if stages else left):
        return f"{words} leaves {left} of {model.num_layers} layers for the other stages, of which there are {stages}"
    return [*given.values(), *([left // stages] if stages else [])]


def _drawn_stages(model: Any) -> _Stages:
    """The stages of a layout such as ``Ett|ttttL``, as Megatron reads it."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    drawn, vpp = model.pipeline_model_parallel_layout, model.virtual_pipeline_model_parallel_size
    name = f"model.pipeline_model_parallel_layout={drawn}"
    try:
        layout = PipelineParallelLayerLayout(drawn, model.pipeline_model_parallel_size)
        layers = layout.flatten_layout.count(LayerType.decoder)
        if layers != model.num_layers:
            return _Stages(problems=(f"{name} has {layers} layers, but the model has {model.num_layers}",))
        layout.validate_layer_layout(layers, None)
    except (AssertionError, NotImplementedError) as error:
        return _Stages(problems=(f"{name}: {str(error).splitlines()[0]}",))
    chunks = layout.virtual_pipeline_model_parallel_size
    if vpp not in (None, chunks):
        return _Stages(problems=(f"{name} has {chunks} virtual stages, not {vpp}",))
    return _Stages(chunks=chunks)
