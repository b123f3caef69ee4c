"""Bytes of objects in aligned chunks, fetched before they are needed by threads of this process.

corpus.py announces what will be read and reads it; chunk_cache.py keeps chunks on disk, objects.py fetches them. Note: a
chunk stays in memory until every window that announced it has read it, so that reading ahead cannot evict what it has just
fetched. Threads start at the first chunk, and a forked process starts its own.
"""

import os
import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import NamedTuple

from ted_scale.storage import objects
from ted_scale.storage.chunk_cache import ChunkCache, key_of
from ted_scale.storage.objects import Object

KEPT = 32  # chunks that were read and stay in memory, because the next window may need them, too


class Coming(NamedTuple):
    """A chunk that is fetched or being fetched, and how many announced windows have not read it yet."""

    future: Future
    readers: int


class Chunks:
    def __init__(self, settings):
        self.settings, self.size = settings, settings.chunk_kib << 10
        self.cache = ChunkCache(settings.place / "chunks", int(settings.cache_gib * 2**30), self.size)
        self.coming: dict[tuple[str, str, int], Coming] = {}  # its size is bounded by what is announced ahead
        self.read_before: OrderedDict[tuple[str, str, int], Future] = OrderedDict()  # oldest use first
        self.lock, self.wanted = threading.Lock(), queue.SimpleQueue()
        for _ in range(settings.requests):
            # Daemons, because the exit of the process must not wait for requests that are no longer needed.
            threading.Thread(target=self._work, daemon=True, name="ted_scale chunks").start()

    def _work(self) -> None:
        while True:
            self._fulfil(*self.wanted.get())

    def _numbers(self, start: int, stop: int) -> range:
        return range(start // self.size, -(-stop // self.size))

    def ahead(self, thing: Object, start: int, stop: int, corpus: str) -> None:
        """Bytes [start, stop) will be read once for this call: begin to fetch their chunks."""
        for number in self._numbers(start, stop):
            key = thing.url, thing.version, number
            with self.lock:
                known = self.coming.get(key) or Coming(self.read_before.pop(key, None), 0)
                future = known.future or Future()
                self.coming[key] = Coming(future, known.readers + 1)
            if known.future is None:
                self.wanted.put((future, thing, number, corpus))

    def read(self, thing: Object, start: int, stop: int, corpus: str) -> bytes:
        pieces = []
        for number in self._numbers(start, stop):
            future, is_new = self._taken((thing.url, thing.version, number))
            if is_new:
                self._fulfil(future, thing, number, corpus)
            first = number * self.size
            pieces.append(future.result()[max(start - first, 0) : stop - first])
        return b"".join(pieces)

    def _taken(self, key: tuple[str, str, int]) -> tuple[Future, bool]:
        """A chunk for one reader, and whether the reader must fetch it."""
        with self.lock:
            known = self.coming.pop(key, None) or Coming(self.read_before.pop(key, None), 1)
            future = known.future or Future()
            if known.readers > 1:
                self.coming[key] = Coming(future, known.readers - 1)
            else:
                self.read_before[key] = future
                while len(self.read_before) > KEPT:
                    self.read_before.popitem(last=False)
            return future, known.future is None

    def _fulfil(self, future: Future, thing: Object, number: int, corpus: str) -> None:
        try:
            future.set_result(self._chunk(thing, number, corpus))
        except BaseException as error:  # its readers get the exception, and the next reader tries again
            with self.lock:
                for kept in (self.coming, self.read_before):
                    kept.pop((thing.url, thing.version, number), None)
            future.set_exception(error)

    def _chunk(self, thing: Object, number: int, corpus: str) -> bytes:
        key = key_of(thing, number, self.size)
        content = self.cache.get(key)
        if content is None:
            start, stop = number * self.size, min((number + 1) * self.size, thing.size)
            what = f"corpus shard {thing.url.removesuffix('.bin')} of {corpus} must be readable"
            content = objects.read(thing, start, stop, what, self.settings.patience_s)
            self.cache.put(key, content)
        return content


_started: dict[object, Chunks] = {}
_starting = threading.Lock()


def chunks_of(settings) -> Chunks:
    """Those of this process, started at the first call."""
    with _starting:
        if settings not in _started:
            _started[settings] = Chunks(settings)
        return _started[settings]


def _begin_anew() -> None:
    global _starting
    _started.clear()
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
