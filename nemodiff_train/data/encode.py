"""Encode documents as token ids, in several processes, in order."""

import os
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import batched
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemodiff_train.processes import exit_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 64
_BATCHES_AHEAD = 4  # for each worker: enough to keep it busy, few enough to bound memory


class EncodedDocument(NamedTuple):
    """One document of a data set."""

    tokens: npt.NDArray[np.int32]
    """[tokens] ids of all its sequences."""
    lengths: list[int]
    """Number of tokens of each sequence."""


@dataclass(frozen=True)
class EncodedBatch:
    """Some inputs as documents, in order."""

    inputs: int
    """Number of texts or conversations."""
    documents: list[EncodedDocument]
    """A conversation may become several."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of inputs without a document, by reason."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Number of parts of messages that the chat template does not read, by what they are."""


@dataclass
class Encoder[Item](ABC):
    """Turn texts or conversations into token ids; pickled to the workers."""

    tokenizer: "PreTrainedTokenizerBase"
    eod_token_id: int
    """The token that ends documents, or answers."""

    @abstractmethod
    def __call__(self, batch: tuple[Item, ...], /) -> EncodedBatch:
        """Encode a batch."""


class TextEncoder(Encoder[str]):
    """Turn texts into documents of one sequence, with no special tokens but the end of the document."""

    def __call__(self, texts: tuple[str, ...]) -> EncodedBatch:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        sequences = [np.array([*ids, self.eod_token_id], dtype=np.int32) for ids in encoded["input_ids"]]
        documents = [EncodedDocument(sequence, [len(sequence)]) for sequence in sequences]
        return EncodedBatch(len(texts), documents, sum(len(text.encode()) for text in texts))


def encode_in_order[Item](items: Iterable[Item], encoder: Encoder[Item], workers: int) -> Iterator[EncodedBatch]:
    """Encode texts or conversations in batches; the result does not depend on ``workers``.

    Args:
        items: Texts or conversations. An exception of theirs is raised after the batches before it.
        encoder: Encodes a batch.
        workers: Number of processes; 1 encodes in this process.

    Raises:
        BrokenProcessPool: A worker has died.
    """
    batches = batched(items, BATCH_DOCUMENTS)
    if workers == 1:
        yield from map(encoder, batches)
        return
    # Not fork, since the readers start threads; and unlike spawn this imports Transformers only once.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, type(encoder.tokenizer).__module__])
    pool = ProcessPoolExecutor(workers, context, initializer=partial(_start_worker, encoder))
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode, batch))
            if len(pending) >= _BATCHES_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder[Any]  # of a worker


def _start_worker(encoder: Encoder[Any]) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exit_with_parent()


def _encode(batch: tuple[object, ...]) -> EncodedBatch:
    return _encoder(batch)
