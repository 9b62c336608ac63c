"""Load a tokenizer, and fingerprint it."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nemodiff_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a directory or by its Hugging Face name, without running code that comes with it.

    Raises:
        UserError: There is no tokenizer, or it is damaged.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise UserError(f"{name}: no such tokenizer directory")
    try:
        # Left unset, a terminal would be asked whether to run the tokenizer's own code.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # damaged files raise any exception in Transformers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{name}: cannot load a tokenizer from it: {reason}") from error


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return one more than the largest token id, added tokens included (ids may have gaps)."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tokens_without_row(tokenizer: "PreTrainedTokenizerBase", rows: int) -> str:
    """Return a line that names the tokens beyond the rows of a model's embedding; empty where there are none."""
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if not beyond:
        return ""
    named = ", ".join(f"'{token}' ({number})" for number, token in beyond[:3])
    return (
        f"the tokenizer has {len(beyond)} tokens for which the model, of {rows} rows, has none, such as {named}; "
        "text that holds them is refused"
    )


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 (hex) of everything that decides how text becomes token ids.

    Equal for a tokenizer and its saved and reloaded copy, whatever directory they are in.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python has no more than its class and vocabulary
        described = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        described = json.loads(backend.to_str())
        # The last call with padding or truncation leaves its settings here.
        described.pop("padding", None)
        described.pop("truncation", None)
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def end_of_document_id(tokenizer: "PreTrainedTokenizerBase", token: str | None) -> int:
    """Return the id to put after each document: that of ``token``, or of the tokenizer's end-of-sequence token.

    Raises:
        UserError: ``token`` is not in the vocabulary, or is ``None`` and the tokenizer has no default.
    """
    if token is not None:
        if token not in (vocabulary := tokenizer.get_vocab()):
            raise UserError(f"--eod-token '{token}': the tokenizer has no such token")
        return vocabulary[token]
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: no end-of-sequence token; name one with --eod-token")
    return int(tokenizer.eos_token_id)
