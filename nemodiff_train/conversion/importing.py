"""``nemodiff convert import``: a Hugging Face model becomes a Megatron checkpoint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict
from torch import Tensor

from nemodiff_train.console import bytes_bar, console, quiet
from nemodiff_train.conversion.headers import Stored
from nemodiff_train.conversion.mask_token import MaskToken, select_mask_token, write_tokenizer
from nemodiff_train.conversion.weights import DTYPES, check_contents, check_weights
from nemodiff_train.distributed import all_gather_object, global_rank, is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.files import atomic_directory, check_free
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.families import VOCABULARY_TENSORS, architecture, stored_name
from nemodiff_train.model.loading import set_parallelism, start_model_parallel
from nemodiff_train.model.pretrained import hf_config, local_copy, model_from, stored_settings
from nemodiff_train.model.provider import TriModeModelProvider


def import_checkpoint(
    source: str,
    output: str,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    mask_token: str | None = None,
    add_mask_token: str | None = None,
) -> None:
    """Make a Megatron checkpoint, complete with tokenizer and configuration, of a Hugging Face model.

    Args:
        source: Hugging Face directory or name.
        output: Folder to create; it gets one ``iter_0000000``.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out.
        mask_token: Token, or id, that is to be the mask token.
        add_mask_token: Token to add to the vocabulary as the mask token.

    Raises:
        UserError: No such model, an unsupported architecture, damaged weights, or existing output.
    """
    if Checkpoint.find(source):
        raise UserError(f"'{source}' is a Megatron checkpoint already; import takes a Hugging Face model")
    check_free(Path(output))
    source = local_copy(source)
    provider = model_from(source)
    check_stages(provider, pipeline_parallel)
    stored = check_weights(Path(source))
    token = select_mask_token(source, provider, mask_token, add_mask_token)
    start_model_parallel(tensor_parallel, pipeline_parallel)
    _check_contents(Path(source), stored)
    take_dtype(provider, next(iter(stored.values())).dtype)
    if token:
        token.tell(provider)
    with atomic_directory(Path(output)) as partial, quiet(), torch.no_grad():
        models = build(provider, tensor_parallel, pipeline_parallel)
        load_weights(models, source, f"importing {source}", token)
        with console.status(f"writing {output}"):
            _save(models, partial, source, token)
    if is_main_process():
        console.print(f"imported [bold]{source}[/bold] to [bold]{output}[/bold]")


def build(provider: TriModeModelProvider, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> list[Any]:
    """This rank's part of a model, without weights, for conversion."""
    set_parallelism(provider, tensor_parallel, pipeline_parallel)
    provider.finalize()
    models: list[Any] = provider.provide_distributed_model(wrap_with_ddp=False)
    return [model.eval() for model in models]


def check_stages(provider: TriModeModelProvider, pipeline_parallel: int) -> None:
    """Refuse stages of unequal size, which conversion has no use for.

    Raises:
        UserError: The layers cannot be shared out evenly.
    """
    if provider.num_layers % pipeline_parallel:
        raise UserError(
            f"--pipeline-parallel {pipeline_parallel} does not divide the model's {provider.num_layers} layers"
        )


def load_weights(models: list[Any], source: str, description: str, token: MaskToken | None = None) -> None:
    """Fill a model from the weights in a Hugging Face directory, with a progress bar.

    Args:
        models: This rank's chunks of a Megatron model.
        source: The directory; its weights have been checked.
        description: What the bar says.
        token: The chosen mask token, whose row is made where it is new.
    """
    pretrained = PreTrainedCausalLM.from_pretrained(source, trust_remote_code=False)
    pretrained.config = hf_config(source)  # Transformers would run the code of a directory that has its own
    with bytes_bar() as bar:
        task = bar.add_task(description, total=sum(p.nbytes for model in models for p in model.parameters()))
        tables = {stored_name(architecture(stored_settings(source)), name) for name in VOCABULARY_TENSORS}
        grow: dict[str, Callable[[Tensor], Tensor]] = (
            dict.fromkeys(tables, token.with_row) if token and token.added else {}
        )
        counted = _Reader(str(Path(source).absolute()), lambda count: bar.advance(task, count), grow)
        pretrained._state_dict_accessor = StateDict(counted)
        AutoBridge(pretrained).load_hf_weights(models)


class _Reader(SafeTensorsStateSource):
    """Bridge's reader, which says how much it has read, and changes some tensors on the way."""

    def __init__(
        self, path: str, advance: Callable[[int], None], changes: dict[str, Callable[[Tensor], Tensor]]
    ) -> None:
        super().__init__(path)
        self._advance, self._changes = advance, changes

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super().load_tensors(keys_to_load)
        self._advance(sum(tensor.nbytes for tensor in found.values()))
        return {
            name: self._changes[name](tensor) if name in self._changes else tensor for name, tensor in found.items()
        }


def _check_contents(directory: Path, stored: dict[str, Stored]) -> None:
    """Read everything once, the ranks sharing the work, before anything is built."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = slice(global_rank(), None, world)
    with bytes_bar() as bar:
        task = bar.add_task(f"checking {directory}", total=sum(t.nbytes for t in list(stored.values())[share]))
        own = check_contents(directory, stored, lambda count: bar.advance(task, count), share)
    if wrong := [line for lines in all_gather_object(own) for line in lines]:
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}")


def take_dtype(provider: TriModeModelProvider, name: str) -> None:
    """Keep the dtype of the weights, whatever ``config.json`` says."""
    dtype = DTYPES[name]
    provider.params_dtype = provider.pipeline_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16


def _save(models: list[Any], partial: Path, source: str, token: MaskToken | None) -> None:
    from megatron.bridge.training.model_load_save import save_megatron_model

    # The model is given up layer by layer; otherwise Megatron would hold the larger part of it twice.
    own_code = {"trust_remote_code": False}  # without this, Transformers would ask whether to run it
    save_megatron_model(
        models, str(partial), hf_tokenizer_path=source, hf_tokenizer_kwargs=own_code, low_memory_save=True
    )
    if is_main_process():
        (iteration,) = partial.glob("iter_*")
        shutil.rmtree(iteration / "tokenizer", ignore_errors=True)
        write_tokenizer(Path(source), iteration / "tokenizer", token)
