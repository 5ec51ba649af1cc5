"""Work done ahead of its use by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """The results of the calls in order, `depth` of them computed ahead by one thread; errors surface in their turn."""
    if depth == 0:
        yield from (call() for call in calls)
        return
    pending: deque[Future[T]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="embtab-reader")
    try:
        for call in calls:
            pending.append(thread.submit(call))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
