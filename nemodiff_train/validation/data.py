"""The data of a run: its blend and split, its tokenizer and mask token, and what text or conversations ask for."""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import ChatDatasetConfig, TextDatasetConfig, parse_number
from nemodiff_train.console import warn
from nemodiff_train.data.blend import check_blend
from nemodiff_train.data.index_file import read_index
from nemodiff_train.data.mock import MOCK
from nemodiff_train.data.tokenizer import load_tokenizer, tokens_beyond_vocabulary
from nemodiff_train.errors import UserError


def problems(config: TriModeConfig) -> Iterator[str]:
    """Yield what is wrong with the data of a run, one line each."""
    yield from _blend_problems(config)
    yield from _kind_problems(config)
    yield from _file_problems(config)


def _blend_problems(config: TriModeConfig) -> Iterator[str]:
    dataset = config.dataset
    shares = [parse_number(share) for share in str(dataset.split).split(",")]
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        yield f"dataset.split is '{dataset.split}'; use three shares, such as '99,1,0'"
    weights = [parse_number(part) for part in dataset.data]
    is_weight = [not math.isnan(weight) for weight in weights]
    if any(is_weight) and is_weight != [True, False] * (len(weights) // 2):
        yield "dataset.data has weights for some; use prefixes alone, or a weight before each"
    if any(weight <= 0 or math.isinf(weight) for weight in weights):
        yield "dataset.data has a weight that is not above 0"


def _kind_problems(config: TriModeConfig) -> Iterator[str]:
    dataset, objective = config.dataset, config.objective
    if MOCK in dataset.data and not (dataset.is_mock and isinstance(dataset, TextDatasetConfig)):
        yield "data=mock is text, and the only data of a run; a recipe of conversations takes data of its own"
    if isinstance(dataset, TextDatasetConfig) and dataset.reset_position_ids and not dataset.reset_attention_mask:
        yield "dataset.reset_position_ids=true takes dataset.reset_attention_mask=true as well"
    block_causal = objective.stage == "joint" and objective.clean_attention == "block_causal"
    if isinstance(dataset, ChatDatasetConfig) and block_causal:
        yield (
            "objective.clean_attention=block_causal decodes blocks counted from the start of the text, but those of "
            "conversations start with answers; set clean_attention=causal"
        )


def _file_problems(config: TriModeConfig) -> Iterator[str]:
    prefixes, mock, rows = config.dataset.prefixes, config.dataset.is_mock, config.model.vocab_size
    if not prefixes and not mock:
        yield "dataset.data is empty; give the prefix of a .bin/.idx made by 'nemodiff data prepare'"
        return
    try:
        mask_token = config.find_mask_token() if config.has_masks else None
        if mock:
            return
        tokenizer = load_tokenizer(str(config.tokenizer.tokenizer_model))
        if line := tokens_beyond_vocabulary(tokenizer, rows):
            warn(line)
        check_blend(prefixes, tokenizer, mask_token, config.dataset.holds_conversations, rows)
    except UserError as error:
        yield str(error)
        return
    for prefix in prefixes:
        yield from split_problems(prefix, str(config.dataset.split))


def split_problems(prefix: str, split: str) -> Iterator[str]:
    """Yield the shares of the documents that Megatron rounds to none: it would look for samples in them for ever."""
    documents = len(read_index(prefix).document_ends) - 1
    shares = [parse_number(share) for share in split.split(",")]
    if not math.isfinite(sum(shares)) or not sum(shares):
        return  # among the problems already
    ends = [round(end / sum(shares) * documents) for end in accumulate(shares, initial=0.0)]
    for name, share, (first, last) in zip(("training", "validation", "test"), shares, pairwise(ends), strict=False):
        if share > 0 and first >= last:
            yield (
                f"dataset.split={split} leaves {name} none of the {documents} documents of {prefix}; give it a "
                "larger share, or 0"
            )
