"""Worker processes that encode: each builds its encoder once, and ends with its parent."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

from system import errors
from text import tokenizer as tokenizers


class Worker:
    """A worker process. `start` runs once in each, before any `encode`."""

    encoder = None  # built by `start`: too large to be sent with each piece

    @classmethod
    def start(cls, make_encoder, description):
        """make_encoder: tokenizer -> a function of pieces; description: the tokenizer's."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        threading.Thread(target=_end_with_parent, daemon=True).start()
        os.environ['TOKENIZERS_PARALLELISM'] = 'false'
        cls.encoder = make_encoder(tokenizers.load(description))

    @classmethod
    def encode(cls, piece):
        return cls.encoder(piece)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def n_cores():
    """The number of processor cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def workers(n, make_encoder, tokenizer):
    """submit(piece) -> a function that returns the piece encoded: by n processes, or, if that is
    one, by this process."""
    if n == 1:
        encoder = make_encoder(tokenizer)
        yield functools.partial(functools.partial, encoder)
        return
    pool = ProcessPoolExecutor(
        n,
        multiprocessing.get_context('spawn'),
        initializer=Worker.start,
        initargs=(make_encoder, tokenizer.describe()),
    )

    def submit(piece):
        with errors.no_interrupt():  # else the processes that this starts would report Ctrl-C
            future = pool.submit(Worker.encode, piece)
            return functools.partial(_result, pool, future)

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


def _result(pool, future):
    """A future's result. Unlike this, a pool waits for ever for the rest of what a process was
    sending when it was killed."""
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            if future.done():  # the error is a worker's
                raise
            processes = list((pool._processes or {}).values())
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                # the last one that is open: the pool sees that nothing more comes
                pool._result_queue._writer.close()
