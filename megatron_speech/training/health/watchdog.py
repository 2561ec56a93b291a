"""Ends a process that waits for something that will not come, soon and with a sentence.

Two threads watch the main one. `Watchdog` reads clocks only, so nothing can keep it waiting: has a step ended within
its time limit, and are the heartbeats of the other ranks recent? `Heartbeat` talks to the launcher's key-value store,
and may block there: it sets "rank 3 lives, step 120", reads the key of the next rank, and the verdict that the run is
over, which any rank may publish. A rank that ends because of an error publishes that too. So the others end within
seconds, instead of when a collective times out after half an hour.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_speech.console import message
from megatron_speech.errors import PeerError
from megatron_speech.recipe.watchdog import WatchdogConfig

EXIT_CODE = 1
_STEPS = 101  # whose median is taken


class StepTimer:
    """What the main thread last reported, and how long it may be silent. Not a thread.

    Args:
        config: the limits.
        clock: monotonic seconds.
    """

    def __init__(self, config: WatchdogConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._lock = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._doing: list[tuple[str, float | None]] = [("starting", None)]
        self._since = clock()
        self.step = 0

    def step_ended(self, step: int) -> None:
        """A step has ended; the next one begins."""
        with self._lock:
            now = self._clock()
            if self._doing[-1][0] == "training":
                self._seconds.append(now - self._since)
            self._doing[0] = ("training", math.nan)
            self._since, self.step = now, step

    def begin_steps(self) -> None:
        """The first step of a process or a stage begins: it may take as long as a pause."""
        with self._lock:
            self._doing[0] = ("the first step", self._config.pause_seconds)
            self._since = self._clock()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """What runs inside is no step (`validating`, `saving`) and may take `pause_seconds`; it counts for no step."""
        with self._lock:
            self._doing.append((what, self._config.pause_seconds))
            before, self._since = self._clock() - self._since, self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._doing.pop()
                self._since = self._clock() - before

    def limit(self) -> float | None:
        """Seconds that the main thread may be silent for now; None: for ever."""
        limit = self._doing[-1][1]
        if limit is None or not math.isnan(limit):
            return limit
        if self._config.timeout_seconds is not None:
            return self._config.timeout_seconds
        if not self._seconds:
            return self._config.pause_seconds
        return max(self._config.floor_seconds, self._config.median_factor * statistics.median(self._seconds))

    def overdue(self) -> str | None:
        """What has taken too long, or None."""
        with self._lock:
            limit, silent = self.limit(), self._clock() - self._since
            if limit is None or silent <= limit:
                return None
            what = self._doing[-1][0]
            what = f"step {self.step + 1}" if what == "training" else what
            return f"{what} has not ended after {silent:.0f} s (watchdog allows {limit:.0f} s)"

    def reset_timer(self) -> None:
        """Count from now: this process was stopped for a while."""
        with self._lock:
            self._since = self._clock()

    def describe(self) -> str:
        """What the main thread is at, for the other ranks."""
        return f"{self._doing[-1][0]} at step {self.step}"


class Heartbeat:
    """Reports to the store that this rank lives, and reads what the next rank reports, and the verdict.

    Args:
        store: a client of the launcher's store that nothing else uses, with keys of this run only.
        rank, hosts: this rank, and the host of every rank.
        describe: what this rank is doing.
        peer_seconds: silence after which a rank is given up.
        clock: monotonic seconds.
    """

    VERDICT = "verdict"
    _DONE, _NONE = "done", "-"

    def __init__(
        self,
        store: Any,
        rank: int,
        hosts: Sequence[str],
        describe: Callable[[], str],
        peer_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rank, self._hosts, self._describe = store, rank, hosts, describe
        self._peer_seconds, self._clock = peer_seconds, clock
        self._next = (rank + 1) % len(hosts)
        self._beats = 0
        self._seen = ""
        self._seen_at = self._answered_at = clock()
        self.interval = min(2.0, peer_seconds / 4)
        self._store.set(f"rank {rank}", "0 starting")  # so that no `get` waits for a key that is not there yet
        if rank == 0:
            self._store.set(self.VERDICT, self._NONE)

    def beat(self) -> str | None:
        """One round; returns the verdict on the run, or None. May wait for the store."""
        self._beats += 1
        try:
            self._store.set(f"rank {self._rank}", f"{self._beats} {self._describe()}")
            verdict = str(self._store.get(self.VERDICT).decode())
            seen = str(self._store.get(f"rank {self._next}").decode())
        except (dist.DistError, RuntimeError):  # no answer in time, or a broken connection: judged by `silent`
            return None
        self._answered_at = self._clock()
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
        return None if verdict == self._NONE else verdict

    def reset_timer(self) -> None:
        """Count from now: this process was stopped for a while."""
        self._seen_at = self._answered_at = self._clock()

    def silent(self) -> str | None:
        """Who has been silent for too long, or None. Waits for nothing."""
        now = self._clock()
        if now - self._answered_at > self._peer_seconds:
            return (
                f"the store of the launcher (on {self._hosts[0]}, where rank 0 runs) has not answered for "
                f"{now - self._answered_at:.0f} s"
            )
        if self._seen != self._DONE and now - self._seen_at > self._peer_seconds:
            doing = self._seen.partition(" ")[2] or "never seen"
            return (
                f"rank {self._next} on {self._hosts[self._next]} has sent no heartbeat for {now - self._seen_at:.0f} s "
                f"(it was {doing}): it is stopped, its node is gone, or it was killed"
            )
        return None

    def publish_verdict(self, verdict: str) -> None:
        """Publish to every rank that the run is over, and why."""
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(self.VERDICT, verdict)

    def done(self) -> None:
        """This rank needs no watching any more."""
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(f"rank {self._rank}", self._DONE)


class Watchdog:
    """The threads, and what they do when it is over: stacks, a sentence, the end of the process.

    Args:
        config: the recipe's `watchdog` section.
        stacks: folder that the stacks of a rank that hangs are written to.
        rank: of this process.
        on_end: called with the sentence before the process ends (to write status.json).
        end: ends the process.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        stacks: Path,
        rank: int,
        on_end: Callable[[str], None],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.progress = StepTimer(config)
        self._config, self._stacks, self._rank = config, stacks, rank
        self._on_end, self._end = on_end, end
        self._host = "this host"
        self._heartbeat: Heartbeat | None = None
        self._verdict: str | None = None
        self._closing = threading.Event()
        self._judged = threading.Event()
        self._threads: list[threading.Thread] = []
        if config.enabled:
            self._start(self._watch, "watchdog")

    def listen(self, store: Any, hosts: Sequence[str], barrier: Callable[[], None]) -> None:
        """Begin to watch the other ranks, which all call this; `store` holds keys of this run only. A collective."""
        self._host = hosts[self._rank]
        if not self._config.enabled or self._config.peer_seconds == 0.0 or len(hosts) == 1:
            return
        seconds = self._config.peer_seconds
        store.set_timeout(timedelta(seconds=max(1.0, seconds / 2)))
        heartbeat = Heartbeat(store, self._rank, hosts, self.progress.describe, seconds)
        barrier()
        heartbeat.reset_timer()
        self._heartbeat = heartbeat
        self._start(self._beat, "heartbeat")

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _beat(self) -> None:
        heartbeat = self._heartbeat
        assert heartbeat is not None
        while not self._closing.wait(heartbeat.interval):
            if (verdict := heartbeat.beat()) is not None:
                self._verdict = verdict
                self._judged.set()
                return

    def _watch(self) -> None:
        shortest = min(self._config.timeout_seconds or 20.0, self._config.peer_seconds or 20.0, 20.0)
        poll, looked = shortest / 20, time.monotonic()
        while not self._closing.is_set():
            self._arm_backup()
            self._judged.wait(poll)
            now = time.monotonic()
            if now - looked > 10 * poll + 1.0:  # SIGSTOP and SIGCONT, or a laptop's lid: no rank is late
                self.progress.reset_timer()
                if self._heartbeat is not None:
                    self._heartbeat.reset_timer()
            looked = now
            if self._closing.is_set():
                return
            if (reason := self._verdict or self._judge()) is not None:
                self._finish(reason)
                return

    def _judge(self) -> str | None:
        """Why the run is over by what this rank sees; published to the others."""
        overdue = self.progress.overdue()
        silent = self._heartbeat and self._heartbeat.silent()
        reason = f"rank {self._rank} on {self._host}: {overdue}" if overdue else silent
        if reason and self._heartbeat is not None:
            threading.Thread(target=self._heartbeat.publish_verdict, args=(reason,), daemon=True).start()
        return reason or None

    def _arm_backup(self) -> None:
        """Let a thread without Python end the process, should this one not run again: the interpreter itself hangs."""
        limit = self.progress.limit()
        if limit is None or self._end is not os._exit:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(2 * limit + 60.0, exit=True, file=2)

    def _finish(self, reason: str) -> None:
        message(
            "error",
            f"{reason}; this process (rank {self._rank}) ends. The stacks of its threads are in "
            f"{self._stacks}/rank_{self._rank}.txt; the same command continues from the newest checkpoint",
        )
        # The file system may be what hangs: what needs it gets a few seconds, not more.
        writer = threading.Thread(target=self._write, args=(reason,), daemon=True)
        writer.start()
        writer.join(5.0)
        self._end(EXIT_CODE)

    def _write(self, reason: str) -> None:
        self._stacks.mkdir(parents=True, exist_ok=True)
        with open(self._stacks / f"rank_{self._rank}.txt", "a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
            handle.flush()
            faulthandler.dump_traceback(handle, all_threads=True)
        self._on_end(reason)

    def report_failure(self, reason: str) -> None:
        """Publish to the other ranks why this one ends. They end too, within `Heartbeat.interval`."""
        if self._heartbeat is not None:
            self._heartbeat.publish_verdict(reason)

    def reason(self) -> str | None:
        """Why the run is over, if another rank has published it or does within a beat."""
        if self._heartbeat is None:
            return None
        # Beat now rather than wait: the thread may be asleep for a whole interval.
        return self._verdict or self._heartbeat.beat()

    def close(self) -> None:
        """Watch no longer; waits for the threads, unless one is stuck in the store."""
        self._closing.set()
        self._judged.set()
        for thread in self._threads:
            thread.join(2.0)
        self._threads.clear()
        faulthandler.cancel_dump_traceback_later()
        if self._heartbeat is not None:
            self._heartbeat.done()
            self._heartbeat = None


def store_of_run(nonce: str) -> Any:
    """A client of the launcher's store for one thread of this process, with keys that begin with `nonce`."""
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return dist.PrefixStore(nonce, store.clone())


def peer_error(error: RuntimeError, watchdog: Watchdog) -> PeerError | None:
    """What `error` means when it is a collective that broke off because another rank has ended; else None."""
    text = str(error)
    words = ("gloo", "NCCL", "Connection", "Socket")
    if not isinstance(error, dist.DistError) and not any(word in text for word in words):
        return None
    cause = watchdog.reason() or "another rank ended without a message: it was killed, or its node is gone; see its log"
    return PeerError(f"{cause} ({text.splitlines()[0][:200]})")
