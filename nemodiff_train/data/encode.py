"""Text to token ids, in several processes, in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import batched
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 64
_BATCHES_AHEAD = 4  # for each worker: enough to keep it busy, few enough to bound memory


class EncodedDocument(NamedTuple):
    """One document of a data set: token ids, and the lengths of the sequences that it is made of."""

    tokens: npt.NDArray[np.int32]
    lengths: list[int]


@dataclass(frozen=True)
class EncodedBatch:
    """What some inputs become, in order.

    Attributes:
        inputs: Texts or conversations.
        documents: Theirs; a conversation may become several.
        text_bytes: UTF-8 bytes of the text.
    """

    inputs: int
    documents: list[EncodedDocument]
    text_bytes: int

    @property
    def tokens(self) -> int:
        """Token ids of all documents."""
        return sum(len(document.tokens) for document in self.documents)


class Encoder(Protocol):
    """Turns documents into token ids; pickled to the workers."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """What it encodes with."""
        ...

    @property
    def eod_token_id(self) -> int:
        """What ends documents, or answers."""
        ...

    def __call__(self, documents: tuple[Any, ...], /) -> EncodedBatch:
        """Encode a batch."""
        ...


@dataclass(frozen=True)
class TextEncoder:
    """Turns texts into documents of one sequence, with no special tokens but the end of the document."""

    tokenizer: "PreTrainedTokenizerBase"
    eod_token_id: int

    def __call__(self, texts: tuple[str, ...]) -> EncodedBatch:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        parts = [np.array([*ids, self.eod_token_id], dtype=np.int32) for ids in encoded]
        documents = [EncodedDocument(part, [len(part)]) for part in parts]
        return EncodedBatch(len(texts), documents, sum(len(text.encode()) for text in texts))


def encode_in_order(texts: Iterable[Any], encoder: Encoder, workers: int) -> Iterator[EncodedBatch]:
    """Encode ``texts`` in batches; the result does not depend on ``workers``.

    One worker encodes in this process.  An exception of ``texts`` is raised once the batches before
    it are out; a worker that dies raises BrokenProcessPool.
    """
    batches = batched(texts, BATCH_DOCUMENTS)
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


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A pool's workers would outlive a parent killed by SIGKILL and wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: tuple[Any, ...]) -> EncodedBatch:
    return _encoder(texts)
