"""A thread that writes shards while the next one is sampled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

_STOP = object()


class Writer:
    """A thread that calls ``write(item)`` in order. ``put`` blocks while ``waiting`` items are in
    the queue.

    As a context manager it waits for all items and raises an error of ``write``. If the block
    itself raises, the queue is dropped and only the current item is finished.
    """

    def __init__(self, write: Callable[[Any], None], waiting: int = 1):
        self._write = write
        self._items: queue.Queue[Any] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="ddim_fast writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._dropping = kind is not None
        self._items.put(_STOP)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, item: Any) -> None:
        """Queue an item. Raise the error of an earlier item."""
        self._raise()
        self._items.put(item)

    def flush(self) -> None:
        """Wait until everything is written. Raise the error of an item."""
        self._items.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            self._dropping = True
            raise error

    def _run(self) -> None:
        # After an error it goes on taking items, so that nobody waits for room in the queue for
        # ever.
        while (item := self._items.get()) is not _STOP:
            try:
                if not self._dropping:
                    self._write(item)
            except BaseException as error:
                self._error, self._dropping = error, True
            finally:
                self._items.task_done()
        self._items.task_done()
