"""The engine on a thread of its own, and who waits for what it says.

The event loop asks; the thread answers between two calls of the device. What a step says is handed over in one call
of the loop, however many requests it is about. The thread leaves a heartbeat: an engine that died or hangs is told from
one that has nothing to do, and everybody who waits for it is told so.
"""

import asyncio
import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gshardx.infer.engine import Engine
from gshardx.infer.request import Output, Request

LOGGER = logging.getLogger("gshardx.server")
IDLE_BEAT = 0.5
"""Seconds between heartbeats where there is nothing to do."""
WATCHED = 0.25
"""Seconds between looks at the heartbeat."""


class EngineDown(Exception):
    """The engine died, or does not move."""


class Said(NamedTuple):
    """An output, and when it was there, on ``time.monotonic``'s clock."""

    output: Output
    at: float


class Seen(NamedTuple):
    """The engine after its newest step: sequences that it was given so far and tokens of their prompts, sequences that
    run and wait, tokens of those that wait, and pages."""

    given: int = 0
    given_tokens: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    free: int = 0
    evictable: int = 0
    held: int = 0


class Caller:
    """Whose requests they are: receives what the engine says of them, in order."""

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self.inbox: asyncio.Queue[Said | Exception | None] = asyncio.Queue()

    async def next(self) -> Said:
        """Raises:
        EngineDown: nothing more will come.
        """
        found = await self.inbox.get()
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found


class Worker:
    """Runs ``engine``; all methods but the thread's own belong to one event loop.

    Args:
        engine: nobody else may use it from now on; its ``stats`` may be read.
        stall: seconds without a heartbeat after which it is taken to hang.
        ended: told after each step how many sequences ended, and whether others wait.
    """

    def __init__(self, engine: Engine, stall: float, ended: Callable[[int, bool], None]) -> None:
        self.engine, self.seen, self.steps = engine, Seen(), 0
        self._stall, self._ended = stall, ended
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._callers: dict[str, Caller] = {}
        self._sent = self._sent_tokens = self._given = self._given_tokens = 0
        self._beat = time.monotonic()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._look()

    def start(self) -> None:
        """Of the thread; to be called inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._beat = time.monotonic()
        self._thread.start()
        self._watching = self._loop.create_task(self._watch())

    async def stop(self) -> None:
        """Let the thread end after its current step, and wait for it a while."""
        self._watching.cancel()
        self._asked.put(None)
        await asyncio.to_thread(self._thread.join, self._stall)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the engine, if anything."""
        if self._error is not None:
            return "the engine has failed"
        still = time.monotonic() - self._beat
        return f"the engine has not moved for {still:.1f} s" if still > self._stall else None

    @property
    def open(self) -> int:
        """Requests that somebody waits for."""
        return len(self._callers)

    @property
    def entering(self) -> int:
        """Sequences on their way to the engine."""
        return self._sent - self.seen.given

    def load(self) -> Seen:
        """With those on their way to the engine among those that wait, each counted once."""
        seen = self.seen
        waiting, tokens = self._sent - seen.given, self._sent_tokens - seen.given_tokens
        return seen._replace(waiting=seen.waiting + waiting, waiting_tokens=seen.waiting_tokens + tokens)

    async def submit(self, requests: list[Request]) -> Caller:
        """Queue all of them, or none.

        Raises:
            Exception: one that the engine refuses, as a rule with BadInput.
            EngineDown: it can't take any.
        """
        if trouble := self.trouble:
            raise EngineDown(trouble)
        caller, sequences = Caller([one.id for one in requests]), sum(one.params.n for one in requests)
        tokens = sum(one.params.n * len(one.prompt) for one in requests)
        for one in requests:
            self._callers[one.id] = caller
        self._sent += sequences
        self._sent_tokens += tokens

        def enter() -> None:
            refused: Exception | None = None
            try:
                for one in requests:
                    self.engine.submit(one)
            except Exception as error:  # whatever it is, the others go on
                refused = error
                for one in requests:
                    self.engine.cancel(one.id)
            self._given += sequences
            self._given_tokens += tokens
            self._look()
            self._in_loop(lambda: caller.inbox.put_nowait(refused))

        self._asked.put(enter)
        try:
            first = await caller.inbox.get()
        except BaseException:
            self.leave(caller)
            raise
        if isinstance(first, Exception):
            self.leave(caller)
            raise first
        return caller

    def leave(self, caller: Caller) -> None:
        """The caller wants no more: what is left of its requests is cancelled before the next step."""
        left = [one for one in caller.ids if self._callers.pop(one, None) is not None]

        def cancel() -> None:
            for one in left:
                self.engine.cancel(one)

        if left:
            self._asked.put(cancel)

    def forget(self, id: str) -> None:
        """A request has said all."""
        self._callers.pop(id, None)

    def fail_all(self, why: str) -> None:
        """Tell everybody who waits that nothing more will come."""
        callers = {id(caller): caller for caller in self._callers.values()}
        for caller in callers.values():
            caller.inbox.put_nowait(EngineDown(why))
            self.leave(caller)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCHED)
            if trouble := self.trouble:
                self.fail_all(trouble)

    def _deliver(self, outputs: list[Output]) -> None:
        now = time.monotonic()
        for output in outputs:
            caller = self._callers.get(output.id)
            if caller is not None:
                caller.inbox.put_nowait(Said(output, now))
        self._ended(sum(output.finish_reason is not None for output in outputs), self.seen.waiting > 0)

    # The thread's.

    def _work(self) -> None:
        try:
            while True:
                self._beat = time.monotonic()
                if not self._do_what_was_asked():
                    return
                if not self.engine.idle:
                    outputs = self.engine.step()
                    self.steps += 1
                    self._look()
                    self._in_loop(functools.partial(self._deliver, outputs))
        except BaseException as error:
            LOGGER.exception("the engine failed")
            self._error = error
            self._in_loop(lambda: self.fail_all("the engine has failed"))

    def _do_what_was_asked(self) -> bool:
        """All that is there; waits a while for something where the engine has nothing to do. False: the end."""
        for number in itertools.count():
            try:
                asked = self._asked.get(block=number == 0 and self.engine.idle, timeout=IDLE_BEAT)
            except queue.Empty:
                return True
            if asked is None:
                return False
            asked()
        raise AssertionError

    def _look(self) -> None:
        scheduler = self.engine.scheduler
        pools = [shard.pool for shard in scheduler.shards]
        self.seen = Seen(
            given=self._given,
            given_tokens=self._given_tokens,
            running=sum(len(shard.running) for shard in scheduler.shards),
            waiting=len(scheduler.waiting),
            waiting_tokens=_total(one.todo for one in scheduler.waiting),
            free=_total(pool.free for pool in pools),
            evictable=_total(pool.evictable for pool in pools),
            held=_total(pool.held for pool in pools),
        )

    def _in_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop was closed: nobody listens any more
            LOGGER.info("nobody listens to the engine any more")


def _total(values: Iterable[int]) -> int:
    return sum(values)
