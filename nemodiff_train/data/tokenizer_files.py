"""The files of a tokenizer: copied as they are, with one token more, or for Transformers 4 as well."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from nemodiff_train.data.tokenizer import files_of_tokenizer, load_tokenizer
from nemodiff_train.errors import UserError


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the files of a tokenizer from a Hugging Face directory, byte for byte.

    Args:
        source: The directory, which may hold a model as well.
        directory: Where they go; created where it is not there.

    Raises:
        UserError: One of them is a link that leads elsewhere.
    """
    for file in files_of_tokenizer(source):
        copy = directory / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)


def restore_tokenizer(name: str, directory: Path) -> None:
    """Replace a tokenizer that Transformers has saved anew by the files that it was loaded from.

    Args:
        name: Where it was loaded from: a directory, or the name of one on the hub; if it is gone, nothing changes.
        directory: Where it was saved.
    """
    try:
        source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return
    others = source.resolve() != directory.resolve() and (source / "tokenizer_config.json").is_file()
    if directory.is_dir() and others:
        shutil.rmtree(directory)
        copy_tokenizer(source, directory)


def add_mask_token(directory: Path, token: str, token_id: int) -> None:
    """Add the mask token to the files of a tokenizer, each in its own notation; everything else stays.

    Raises:
        UserError: The tokenizer does not know the token under this id afterwards.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def into_tokens(content: dict[str, Any]) -> None:
        content["added_tokens"] = [*(content.get("added_tokens") or []), {"id": token_id, "content": token, **flags}]

    def into_config(content: dict[str, Any]) -> None:
        content["mask_token"] = token
        if "added_tokens_decoder" in content or not (directory / "tokenizer.json").is_file():
            content.setdefault("added_tokens_decoder", {})[str(token_id)] = {"content": token, **flags}

    _change(directory / "tokenizer.json", into_tokens)
    _change(directory / "tokenizer_config.json", into_config)
    _change(directory / "special_tokens_map.json", lambda content: content.update(mask_token=token))
    _change(directory / "added_tokens.json", lambda content: content.update({token: token_id}))
    tokenizer = load_tokenizer(str(directory))
    if (tokenizer.mask_token, tokenizer.mask_token_id) != (token, token_id):
        raise UserError(
            f"'{token}' cannot be added to the tokenizer, which gives it the id {tokenizer.mask_token_id} instead of "
            f"{token_id}; name one of its reserved tokens with --mask-token"
        )


def rename_for_transformers_4(directory: Path) -> None:
    """Rename what only Transformers 5 writes into a ``tokenizer_config.json`` and Transformers 4 cannot read.

    Version 5 reads both names alike.  A file that an older version has written is left as it is.
    """

    def rename(content: dict[str, Any]) -> None:
        if content.get("tokenizer_class") == "TokenizersBackend":
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(content.get("extra_special_tokens"), list):
            content["additional_special_tokens"] = content.pop("extra_special_tokens")

    _change(directory / "tokenizer_config.json", rename)


def _change(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place, where it is there; it is not written where nothing changes."""
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        change(content)
        if content != json.loads(text):
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
