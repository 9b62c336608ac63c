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
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 64
_BATCHES_AHEAD = 4  # for each worker: enough to keep it busy, few enough to bound memory


@dataclass(frozen=True)
class EncodedBatch:
    """Documents end to end, each followed by the end-of-document token.

    Attributes:
        tokens: Token ids, int32 of shape [sum of lengths].
        lengths: Tokens in each document, int64 of shape [documents].
        text_bytes: UTF-8 bytes of the text.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    text_bytes: int

    def documents(self) -> list[npt.NDArray[np.int32]]:
        """The documents one by one, as views."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


@dataclass(frozen=True)
class Encoder:
    """Turns texts into token ids without the tokenizer's own special tokens."""

    tokenizer: "PreTrainedTokenizerBase"
    eod_token_id: int

    def __call__(self, texts: tuple[str, ...]) -> EncodedBatch:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        parts = [np.array([*ids, self.eod_token_id], dtype=np.int32) for ids in encoded]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return EncodedBatch(np.concatenate(parts), lengths, sum(len(text.encode()) for text in texts))


def encode_in_order(texts: Iterable[str], encoder: Encoder, workers: int) -> Iterator[EncodedBatch]:
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


def _encode(texts: tuple[str, ...]) -> EncodedBatch:
    return _encoder(texts)
