"""``nemodiff convert import``: make a Megatron checkpoint of a Hugging Face model."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict
from megatron.bridge.training.model_load_save import save_megatron_model
from megatron.core.models.gpt import GPTModel
from rich.text import Text
from torch import Tensor

from nemodiff_train.console import bytes_bar, console, quiet, say, warn
from nemodiff_train.conversion.comparison import (
    COMPARED_TOKENS,
    POSITIONS,
    ROUNDING,
    TOLERANCE,
    logits_differ,
    miniature,
    reference,
    unusual_settings,
)
from nemodiff_train.conversion.mask_token import MaskToken, select_mask_token
from nemodiff_train.conversion.weights import check_contents, check_weights
from nemodiff_train.data.tokenizer import tokens_beyond_vocabulary
from nemodiff_train.data.tokenizer_files import add_mask_token, copy_tokenizer
from nemodiff_train.distributed import all_gather_object, barrier, is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.files import atomic_directory
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import write_checksums
from nemodiff_train.model.families import VOCABULARY_TENSORS
from nemodiff_train.model.hf_directory import HFDirectory
from nemodiff_train.model.loading import set_dtype, set_parallelism, start_model_parallel
from nemodiff_train.model.pretrained import model_from, model_like
from nemodiff_train.model.provider import TriModeModelProvider


def import_checkpoint(
    source: HFDirectory,
    output: str,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    mask_token: str | None = None,
    add_mask_token: str | None = None,
) -> None:
    """Make a Megatron checkpoint, with tokenizer and configuration, of a Hugging Face model.

    Args:
        source: The model's directory.
        output: Folder to create; it gets one ``iter_0000000``.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out.
        mask_token: Token of the vocabulary, or its id, that becomes the mask token.
        add_mask_token: Token that is added to the vocabulary as the mask token.

    Raises:
        UserError: The architecture is not supported, the weights are damaged, or the output exists.
    """
    provider = model_from(str(source.path))
    check_stages(provider, pipeline_parallel)
    check_weights(source)
    tokenizer = source.tokenizer
    token = select_mask_token(source, provider, mask_token, add_mask_token)
    start_model_parallel(tensor_parallel, pipeline_parallel)
    _check_computation(source, tensor_parallel, pipeline_parallel)
    check_contents(source)
    set_dtype(provider, source.dtype)
    if token:
        provider.mask_token_id = token.id
    if token and token.id >= provider.vocab_size:  # there is no row to spare
        provider.vocab_size = provider.hf_config["vocab_size"] = token.id + 1
    with atomic_directory(Path(output)) as partial, quiet(), torch.no_grad():
        models = build(provider, tensor_parallel, pipeline_parallel)
        load_weights(models, source, f"importing {source}", token)
        _compare_logits(models, source, token)
        with console.status(Text(f"writing {output}")):
            _save(models, partial, source.path, token)
        model_from(Checkpoint.open(partial))  # an activation, for example, that Bridge saves but does not take back
    say(f"imported {source} to {output}")
    if line := tokens_beyond_vocabulary(tokenizer, provider.vocab_size):
        warn(line)
    if dropout := source.settings.get("attention_dropout"):
        warn(f"'{source}/config.json': attention_dropout={dropout} is not used; training here is without dropout")
    if left_out := source.headers.keys() - source.weights.keys():
        say(f"left out: {len(left_out)} tensors of {', '.join(sorted({name.split('.')[0] for name in left_out}))}")


def build(provider: TriModeModelProvider, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> list[GPTModel]:
    """Return this rank's chunks of a model, without weights, for conversion."""
    set_parallelism(provider, tensor_parallel, pipeline_parallel)
    provider.finalize()
    models: list[GPTModel] = provider.provide_distributed_model(wrap_with_ddp=False)
    return [model.eval() for model in models]


@torch.no_grad()
def _check_computation(source: HFDirectory, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Refuse a ``config.json`` with a setting that Megatron computes differently from Transformers; on all ranks.

    Raises:
        UserError: Names the settings that are not the family's defaults.
    """
    model = miniature(source.settings, tensor_parallel, pipeline_parallel)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        chunks = build(model_like(model.config), tensor_parallel, pipeline_parallel)
        load_weights(chunks, HFDirectory(Path(folder)), f"checking the settings of {source}")
    difference, largest = logits_differ(model, chunks, min(POSITIONS, model.config.max_position_embeddings))
    if not difference <= TOLERANCE[next(chunks[0].parameters()).device.type] * largest:
        raise UserError(
            f"{source.architecture} is not supported as '{source}/config.json' describes it: Megatron's logits of "
            f"a small model with these settings are up to {difference:.2g} away from Transformers', of {largest:.2g} "
            f"(not the family's defaults: {', '.join(unusual_settings(model.config)) or 'none'}); use a model whose "
            "settings are supported (docs/conversion.md)"
        )


def _compare_logits(models: list[GPTModel], source: HFDirectory, token: MaskToken | None) -> None:
    """Compare what was imported with Transformers' model on a few tokens; called on all ranks.

    The row of a new mask token, which may be one that no token had, is left out.

    Raises:
        NotFinite: Some are infinite or NaN in the dtype of the weights; decoding would refuse them too.
        UserError: They differ by more than rounding.
    """
    model = reference(source, source.dtype)
    difference, largest = logits_differ(model, models, COMPARED_TOKENS, token.id if token and token.added else None)
    allowed = ROUNDING * torch.finfo(source.dtype).eps * largest
    if not difference <= allowed:
        raise UserError(
            f"the imported model's logits are up to {difference:.2g} away from Transformers', of {largest:.2g}, "
            f"where rounding explains {allowed:.2g}: '{source}' is not supported; use another model, and report this"
        )


def check_stages(provider: TriModeModelProvider, pipeline_parallel: int) -> None:
    """Refuse pipeline stages of unequal size, which conversion has no use for.

    Raises:
        UserError: The number of stages does not divide the number of layers.
    """
    if provider.num_layers % pipeline_parallel:
        raise UserError(
            f"--pipeline-parallel {pipeline_parallel} does not divide the model's {provider.num_layers} layers; "
            "name a number that does"
        )


@torch.no_grad()
def load_weights(
    models: list[GPTModel], source: HFDirectory, description: str, token: MaskToken | None = None
) -> None:
    """Fill a model from the weights in a Hugging Face directory, with a progress bar.

    Args:
        models: This rank's chunks.
        source: The directory; its weights have been checked.
        description: Text of the bar.
        token: The mask token, which gets a row where it is new.

    Raises:
        UserError: A tensor of the directory was not read, or a parameter of the model got no values.
    """
    for model in models:
        for parameter in model.parameters():
            if parameter.numel():  # one that is left out keeps these
                parameter.view(-1)[[0, -1]] = torch.nan
    pretrained = PreTrainedCausalLM.from_pretrained(str(source.path), trust_remote_code=False)
    pretrained.config = source.config  # Transformers would run the code of a directory that has its own
    with bytes_bar() as bar:
        task = bar.add_task(description, total=sum(p.nbytes for model in models for p in model.parameters()))
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        if token and token.added:
            changes = {source.stored_name(name): token.add_row for name in VOCABULARY_TENSORS}
        reader = _Reader(str(source.path.absolute()), lambda count: bar.advance(task, count), changes)
        pretrained._state_dict_accessor = StateDict(reader)
        AutoBridge(pretrained).load_hf_weights(models)
    _check_all_read(models, source, reader.read)


def _check_all_read(models: list[GPTModel], source: HFDirectory, read: set[str]) -> None:
    """Refuse a model of which a tensor or parameter was left out; called on all ranks."""
    parameters = [named for model in models for named in model.named_parameters()]
    # First and last element are still what load_weights() put there.
    empty = [name for name, p in parameters if p.numel() and p.view(-1)[[0, -1]].isnan().any()]
    everything = all_gather_object((read, empty))
    names = set().union(*(names for names, _ in everything))
    unread = [name for name in map(source.stored_name, source.shapes) if name not in names]
    if left_out := [*unread, *(name for _, names in everything for name in names)]:
        raise UserError(
            f"{source.architecture} is not supported as '{source}/config.json' describes it: '{left_out[0]}' and "
            f"{len(left_out) - 1} more tensors have no counterpart; use a supported architecture (docs/conversion.md)"
        )


class _Reader(SafeTensorsStateSource):
    """Bridge's reader, which also reports what it has read, and changes some tensors on the way."""

    def __init__(
        self, path: str, advance: Callable[[int], None], changes: dict[str, Callable[[Tensor], Tensor]]
    ) -> None:
        super().__init__(path)
        self._advance, self._changes = advance, changes
        self.read: set[str] = set()
        """Names of the tensors read so far."""

    def load_tensors(self, keys_to_load: list[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = super().load_tensors(keys_to_load)
        self._advance(sum(tensor.nbytes for tensor in tensors.values()))
        self.read.update(tensors)
        for name in tensors.keys() & self._changes.keys():
            tensors[name] = self._changes[name](tensors[name])
        return tensors


def _save(models: list[GPTModel], partial: Path, source: Path, token: MaskToken | None) -> None:
    # The model is freed layer by layer; otherwise Megatron would hold the larger part of it twice.
    no_code = {"trust_remote_code": False}  # without this, Transformers would ask whether to run it
    save_megatron_model(
        models, str(partial), hf_tokenizer_path=str(source), hf_tokenizer_kwargs=no_code, low_memory_save=True
    )
    barrier()
    if is_main_process():
        (iteration,) = partial.glob("iter_*")
        tokenizer = iteration / "tokenizer"
        shutil.rmtree(tokenizer, ignore_errors=True)
        copy_tokenizer(source, tokenizer)  # as it is
        if token and token.added:
            add_mask_token(tokenizer, token.token, token.id)
        write_checksums(iteration)  # compared at every load, and by adapters trained on it
