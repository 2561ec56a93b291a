"""Worker processes: a function over items, results in the order of the items, a bounded number in flight."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NoReturn, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_state: Any = None


def interrupt_on_sigterm() -> None:
    """Let this process end on SIGTERM as on Ctrl-C, so that what is in the making is removed."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(make_state: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker, not one pool of threads in each
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    global _state
    _state = make_state(*arguments)
    gc.freeze()


def _die_with(sentinel: int) -> None:
    """End this worker when its parent is gone: a killed parent cannot end its workers."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _call(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_state, item)


def map_ordered(
    function: Callable[[Any, Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    make_state: Callable[..., Any],
    arguments: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """`function(state, item)` for each item, in order.

    `state` is `make_state(*arguments)`, made once per worker. With one worker all is done in this process. An
    exception of `function` is raised here, at its item's turn. At most four items per worker are in flight, so
    neither a slow consumer nor a long `items` fills the memory.
    """
    if workers <= 1:
        state = make_state(*arguments)
        gc.freeze()  # all modules and the state stay: the collector need not go through them with every batch
        for item in items:
            yield function(state, item)
        return
    # spawn: the children start clean, whatever threads pyarrow or tokenizers have running here
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (make_state, arguments))
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(executor.submit(_call, function, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process died (out of memory?); use fewer --workers") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
