"""Check the data sets of a training run: intact, prepared with the model's tokenizer, and without the mask token."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemodiff_train.data.index_file import Index, read_index
from nemodiff_train.data.manifest import Manifest, check_files, count_tokens, read_counts
from nemodiff_train.data.tokenizer import tokenizer_fingerprint, vocabulary_size
from nemodiff_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCAN_TOKENS = 10_000_000  # read from a data set without counts: well under a second


def check_blend(
    prefixes: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    mask_token_id: int | None,
    conversations: bool = False,
    model_vocab_size: int | None = None,
) -> None:
    """Refuse data that this tokenizer and mask token cannot be trained on.

    A data set without a manifest (made by another tool) is judged by its first 10 million tokens, or by all of them
    where the tokenizer has more tokens than the model.

    Args:
        prefixes: The data sets.
        tokenizer: The model's tokenizer.
        mask_token_id: None in a stage without a mask token.
        conversations: Whether documents have to be conversations rather than text.
        model_vocab_size: Ids that the model has; None for as many as the tokenizer has.

    Raises:
        UserError: A data set is missing, incomplete, empty, or made with another tokenizer; two end
            their documents differently; the mask token is outside the vocabulary, or is in the text; or it holds
            text instead of conversations, or the other way round.
    """
    vocab_size = vocabulary_size(tokenizer)
    if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
        raise UserError(
            f"mask token id {mask_token_id} is outside the tokenizer's ids 0..{vocab_size - 1}; set "
            "objective.mask_token, or --mask-token of the import, to a reserved token"
        )
    fingerprint = tokenizer_fingerprint(tokenizer)
    endings: dict[int, str] = {}
    for prefix in dict.fromkeys(prefixes):
        manifest = Manifest.read(prefix)
        check_files(prefix, manifest)
        if manifest is not None and manifest.tokenizer.fingerprint != fingerprint:
            raise UserError(
                f"{prefix}: prepared with another tokenizer than the model's "
                f"('{manifest.tokenizer.name}'); prepare it again with the model's"
            )
        index = read_index(prefix)
        is_chat = manifest is not None and manifest.chat_template is not None
        if conversations and not is_chat:
            raise UserError(f"{prefix}: holds no conversations; prepare it with 'nemodiff data prepare --chat'")
        if is_chat and not conversations:
            raise UserError(
                f"{prefix}: holds conversations, which this run does not read; use sft, or prepare it without --chat"
            )
        _check_tokens(prefix, manifest, index, tokenizer, mask_token_id, model_vocab_size or vocab_size)
        if manifest is not None:
            endings[manifest.eod_token_id] = prefix
    if len(endings) > 1:
        described = ", ".join(f"{prefix} with id {token}" for token, prefix in endings.items())
        raise UserError(f"the data sets end documents differently: {described}; prepare them alike")


def _check_tokens(
    prefix: str,
    manifest: Manifest | None,
    index: Index,
    tokenizer: "PreTrainedTokenizerBase",
    mask_token_id: int | None,
    model_vocab_size: int,
) -> None:
    """Refuse ids beyond the tokenizer's and the model's, padding tokens in text, and the mask token."""
    vocab_size = vocabulary_size(tokenizer)
    if manifest is not None and Path(f"{prefix}.counts.npy").is_file():
        counts = read_counts(prefix, manifest)
    else:
        limit = SCAN_TOKENS if model_vocab_size >= vocab_size else None
        counts = count_tokens(Path(f"{prefix}.bin"), index.dtype, vocab_size, limit)
    if len(counts) > vocab_size:
        raise UserError(f"{prefix}: holds token ids beyond the tokenizer's {vocab_size}; prepare it again")
    if len(beyond := np.flatnonzero(counts[model_vocab_size:])):
        token_id = model_vocab_size + int(beyond[0])
        raise UserError(
            f"{prefix}: token {token_id} ('{tokenizer.convert_ids_to_tokens(token_id)}') occurs {counts[token_id]} "
            f"times, but the model has tokens 0 to {model_vocab_size - 1}; leave it out of the text"
        )
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    is_text = manifest is None or manifest.chat_template is None
    if is_text and pad is not None and pad != end and pad < len(counts) and counts[pad]:
        raise UserError(
            f"{prefix}: the tokenizer's padding token {pad} occurs {counts[pad]} times in the data, and Megatron "
            "would train on none of them; prepare it with another --eod-token"
        )
    if mask_token_id is not None and counts[mask_token_id]:
        token = tokenizer.convert_ids_to_tokens(mask_token_id)
        raise UserError(
            f"{prefix}: the mask token {mask_token_id} ('{token}') occurs {counts[mask_token_id]} times as text; "
            "set objective.mask_token, or --mask-token of the import, to a reserved token"
        )
