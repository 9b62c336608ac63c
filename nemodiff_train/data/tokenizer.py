"""Load a tokenizer, and fingerprint it."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nemodiff_train.errors import UserError
from nemodiff_train.runtime.replace import replace_in

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "vocab*",
    "merges*",
    "bpe.codes",
    "*.model",
    "*.model.v*",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*",
    "SYSTEM_PROMPT*",
)
"""Every name that a tokenizer, its templates or its publisher's system prompt have in Hugging Face directories."""
_TOKENIZER_SOURCES = "give a directory with tokenizer files, or a Hugging Face name"


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a directory or by its Hugging Face name, without running code that comes with it.

    Its token ids are those of ``tokenizer.json``, where there is one, whatever class ``tokenizer_config.json`` names.

    Raises:
        UserError: There is no tokenizer, it is damaged, or one of its files is a link that leads elsewhere.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of settings in published files that change nothing
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise UserError(f"{name}: no such directory; {_TOKENIZER_SOURCES}")
    files_of_tokenizer(path)
    try:
        # Left unset, a terminal would be asked whether to run the tokenizer's own code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        use_tokenizer_file(tokenizer, name)
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # damaged files raise any exception in Transformers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{name}: cannot load a tokenizer from it: {reason}; {_TOKENIZER_SOURCES}") from error


def files_of_tokenizer(source: Path) -> list[Path]:
    """Return the files of a tokenizer in a Hugging Face directory, sorted; none if it is not a directory.

    A link is followed inside the directory alone, or from a snapshot in Hugging Face's cache to the files of the same
    repository: a directory from elsewhere could name any file of this machine, and checkpoints would carry it away.

    Raises:
        UserError: Names a link that leads elsewhere, and its target.
    """
    files = sorted({file for pattern in PATTERNS for file in source.glob(pattern) if file.is_file()})
    root = source.resolve()
    stored = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for file in files:
        target = file.resolve()
        if not (target.is_relative_to(root) or target.is_relative_to(stored)):
            raise UserError(
                f"'{file}' is a link to '{target}', outside the directory; put the file itself there if it belongs "
                "to the tokenizer, else remove the link"
            )
    return files


def use_tokenizer_file(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Let a tokenizer encode and decode as its ``tokenizer.json`` does.

    Transformers keeps the vocabulary of that file and builds the rest as the class in ``tokenizer_config.json`` has
    it: a byte-level tokenizer under Llama's class then loses every space and line break.

    Args:
        tokenizer: As Transformers has loaded it; its backend may be replaced.
        name: Directory or Hugging Face name that it was loaded from.

    Raises:
        UserError: It adds a token that cannot have the same id in the file's vocabulary.
    """
    from tokenizers import Tokenizer
    from transformers.utils.hub import cached_file

    backend = getattr(tokenizer, "backend_tokenizer", None)
    absent = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(name, TOKENIZER_FILE, **absent)
    if backend is None or not file:
        return
    stored = Tokenizer.from_file(str(file))
    if _encoding(stored) == _encoding(backend):
        return
    # Tokens of the user's that the file lacks; those of the class alone are not in the model's vocabulary.
    config = cached_file(name, "tokenizer_config.json", **absent)
    named = json.dumps(json.loads(Path(str(config)).read_bytes())) if config else ""
    ids = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    for token in tokenizer.added_tokens_decoder.values():
        if json.dumps(str(token)) in named and stored.token_to_id(str(token)) is None:
            stored.add_tokens([token])
        if stored.token_to_id(str(token)) not in (None, ids[str(token)]):
            raise UserError(
                f"{name}: tokenizer_config.json gives '{token}' the id {ids[str(token)]}, {TOKENIZER_FILE} "
                f"{stored.token_to_id(str(token))}; correct one of them"
            )
    stored.post_processor = backend.post_processor  # the tokens that tokenizer_config.json adds at either end
    # Until: a tokenizer of a class of its own can be given another backend (not in Transformers 5.12.1).
    replace_in(tokenizer, "_tokenizer", stored, takes=None)
    for kind, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str) and stored.token_to_id(token) is None:
            setattr(tokenizer, kind, None)


def _encoding(backend: "Tokenizer") -> dict[str, object]:
    """Return what decides how text becomes ids and ids text, without the tokens that are added on request."""
    described = json.loads(backend.to_str())
    parts = ("normalizer", "pre_tokenizer", "model", "decoder", "added_tokens")
    return {part: described[part] for part in parts}


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return one more than the largest token id, added tokens included (ids may have gaps)."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tokens_beyond_vocabulary(tokenizer: "PreTrainedTokenizerBase", model_vocab_size: int) -> str:
    """Return a line that names the tokens beyond a model's vocabulary; empty where there are none."""
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= model_vocab_size)
    if not beyond:
        return ""
    named = ", ".join(f"'{token}' ({number})" for number, token in beyond[:3])
    return (
        f"the tokenizer has {len(beyond)} token {'ids' if len(beyond) > 1 else 'id'} beyond the model's vocabulary "
        f"of {model_vocab_size:,}, such as {named}; text that contains them is refused"
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
            raise UserError(f"--eod-token '{token}': the tokenizer has no such token; name one that it has")
        return vocabulary[token]
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: no end-of-sequence token; name one with --eod-token")
    return int(tokenizer.eos_token_id)
