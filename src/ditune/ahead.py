"""Work that threads do ahead of the loop that takes its results."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], waiting: int) -> Iterator[R]:
    """Results of `work` in the order of the items; threads go on while the reader is busy with one.

    Args:
        work: of one item; it releases the interpreter's lock, as decoding images does.
        items: read as far as the threads are ahead.
        waiting: results that the threads are ahead at most.
    """
    results: deque[Future[R]] = deque()
    with ThreadPoolExecutor(min(waiting, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                results.append(pool.submit(work, item))
                if len(results) > waiting:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        finally:
            for result in results:  # the reader has left
                result.cancel()
