"""Select the mask token of an imported model: a token of its vocabulary, or a new one with a row of its own."""

import re
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemodiff_train.data.tokenizer import vocabulary_size
from nemodiff_train.errors import UserError
from nemodiff_train.model.hf_directory import HFDirectory
from nemodiff_train.model.provider import TriModeModelProvider

_NAMED_RESERVED = re.compile(r"mask|reserved|unused|fim_pad|special_\d", re.IGNORECASE)
"""Names of tokens without a use: ``<|reserved_special_token_0|>``, ``<|fim_pad|>``, ``<SPECIAL_20>``, ..."""


@dataclass(frozen=True)
class MaskToken:
    """The mask token of an imported model."""

    id: int
    token: str
    added: bool
    """Whether it is new to the tokenizer."""

    def add_row(self, weight: Tensor) -> Tensor:
        """Return an embedding or output layer in which the token's row is the mean of the other rows.

        Args:
            weight: [vocabulary, hidden], before the token was added.

        Returns:
            [max(vocabulary, id + 1), hidden].
        """
        others = torch.arange(len(weight)) != self.id  # [vocabulary]: the token may have an unused row already
        # [1, hidden] mean of the other rows, and [max(vocabulary, id + 1), hidden] with as many new rows as needed.
        mean = weight[others].mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        longer = torch.cat([weight, mean.expand(max(self.id + 1 - len(weight), 0), -1)])
        longer[self.id] = mean
        return longer


def select_mask_token(
    source: HFDirectory, provider: TriModeModelProvider, mask_token: str | None, add_mask_token: str | None
) -> MaskToken | None:
    """Return the mask token that the options name, or None where both are None.

    Args:
        source: The model's directory.
        provider: Its configuration.
        mask_token: Token of the vocabulary, or its id.
        add_mask_token: Token to add to the vocabulary.

    Raises:
        UserError: There is no such token, the one to add exists, or the model has a mask token already.
    """
    if mask_token is None and add_mask_token is None:
        return None
    if provider.mask_token_id is not None:
        raise UserError(
            f"'{source}' has mask token {provider.mask_token_id} already; import it without "
            "--mask-token and --add-mask-token"
        )
    vocabulary: dict[str, int] = source.tokenizer.get_vocab()
    if add_mask_token is not None:
        if not add_mask_token.strip():
            raise UserError("--add-mask-token is empty; give the new token a name, such as '<mask>'")
        if add_mask_token in vocabulary:
            raise UserError(
                f"--add-mask-token '{add_mask_token}' is token {vocabulary[add_mask_token]} already; use --mask-token"
            )
        return MaskToken(vocabulary_size(source.tokenizer), add_mask_token, added=True)
    assert mask_token is not None
    token_id = vocabulary.get(mask_token, int(mask_token) if mask_token.isdecimal() else -1)
    if not 0 <= token_id < provider.vocab_size:
        raise UserError(
            f"--mask-token '{mask_token}' is neither a token of '{source}' nor an id below {provider.vocab_size}; "
            "name a reserved token, or use --add-mask-token"
        )
    return MaskToken(token_id, str(source.tokenizer.convert_ids_to_tokens(token_id)), added=False)


def reserved_token(tokenizer: PreTrainedTokenizerBase, rows: int, stop_tokens: Container[int]) -> str | None:
    """Return a token that was reserved and that no text holds, best one named so, or None where there is none.

    Args:
        tokenizer: A model's.
        rows: Rows of its embedding.
        stop_tokens: Ids that end an answer.
    """
    template = tokenizer.chat_template or ""
    used = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}  # those with a role
    free = [
        str(token)
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token_id < rows
        and token_id not in stop_tokens
        and not (str(token) in used or str(token) in str(template))
        and (token.special or _NAMED_RESERVED.search(str(token)))
    ]
    return next(filter(_NAMED_RESERVED.search, free), free[0] if free else None)
