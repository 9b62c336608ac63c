"""The mask token that an import chooses: a token the vocabulary has, or a new one with a row of its own."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemodiff_train.data.tokenizer import load_tokenizer, vocabulary_size
from nemodiff_train.errors import UserError
from nemodiff_train.model.provider import TriModeModelProvider

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template*",
    "*.jinja",
)


@dataclass(frozen=True)
class MaskToken:
    """A chosen mask token."""

    id: int
    token: str
    added: bool
    """Whether the tokenizer has to be given it."""

    def tell(self, provider: TriModeModelProvider) -> None:
        """Make it the model's, and the vocabulary one row larger where it has no row yet."""
        provider.mask_token_id = self.id
        if self.id >= provider.vocab_size:
            provider.vocab_size = provider.hf_config["vocab_size"] = self.id + 1

    def with_row(self, weight: Tensor) -> Tensor:
        """An embedding or output layer with the token's row, which is the mean of the other rows.

        Args:
            weight: [vocabulary, hidden], before the token was added.
        """
        others = torch.arange(len(weight)) != self.id
        mean = weight[others].mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        longer = torch.cat([weight, mean.expand(max(self.id + 1 - len(weight), 0), -1)])
        longer[self.id] = mean
        return longer


def select_mask_token(
    source: str, provider: TriModeModelProvider, mask_token: str | None, add_mask_token: str | None
) -> MaskToken | None:
    """The mask token that the options ask for; None where they leave the model's own.

    Raises:
        UserError: No such token, one that exists already, or a model that has another mask token.
    """
    if mask_token is None and add_mask_token is None:
        return None
    if provider.mask_token_id is not None:
        raise UserError(
            f"'{source}' has mask token {provider.mask_token_id} already; import it without "
            "--mask-token and --add-mask-token"
        )
    tokenizer = load_tokenizer(source)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if add_mask_token is not None:
        if not add_mask_token.strip():
            raise UserError("--add-mask-token is empty; give the new token a name, such as '<mask>'")
        if add_mask_token in vocabulary:
            raise UserError(
                f"--add-mask-token '{add_mask_token}' is token {vocabulary[add_mask_token]} already; use --mask-token"
            )
        return MaskToken(vocabulary_size(tokenizer), add_mask_token, added=True)
    assert mask_token is not None
    found = vocabulary.get(mask_token, int(mask_token) if mask_token.isdecimal() else -1)
    if not 0 <= found < provider.vocab_size:
        raise UserError(
            f"--mask-token '{mask_token}' is neither a token of '{source}' nor an id below {provider.vocab_size}; "
            "name a reserved token, or use --add-mask-token"
        )
    return MaskToken(found, str(tokenizer.convert_ids_to_tokens(found)), added=False)


def write_tokenizer(source: Path, directory: Path, token: MaskToken | None = None) -> None:
    """Copy a tokenizer's files as they are, and add the mask token where it is new.

    Args:
        source: Hugging Face directory.
        directory: Where to write; created.
        token: The chosen mask token.
    """
    directory.mkdir(parents=True)
    for file in sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)}):
        if file.is_file():
            shutil.copy2(file, directory / file.name)
    if token and token.added:
        tokenizer = load_tokenizer(str(directory))
        tokenizer.add_special_tokens({"mask_token": token.token})
        tokenizer.save_pretrained(directory)
