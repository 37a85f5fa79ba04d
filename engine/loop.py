"""The step thread: commands in, steps through the executor, one list of outputs a step out.

    drain the inbox → sweep leases and pins → hand their outputs over → schedule → launch step n → collect step n - 1
    (depth 2) or n (depth 1) → hand its outputs over

Everything behind the inbox belongs to this thread: scheduler, cache, leases, executor. It waits when there is nothing
to do, for a command or the nearest deadline, and for steps: a prompt's takes as long as tens of decodes, and commands
run meanwhile, so that nobody's lease, claim or send waits for somebody else's prompt. `submit`, `abort`, `ask`,
`command`, `start`, `stop` and `load` are for other threads.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from msgspec import structs

from microserve.engine.executor import DeviceLost
from microserve.engine.metrics import EngineMetrics
from microserve.engine.scheduler import MAX_DEPTH
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import InternalError, MicroserveError
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.executor import Executor
    from microserve.engine.outputs import Output
    from microserve.engine.receiving import Receiving
    from microserve.engine.request import Request
    from microserve.engine.scheduler import Scheduler
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import Load

T = TypeVar("T")

_SNAPSHOT_INTERVAL = 0.05
"""Seconds that a load snapshot may be old while steps run."""
_LONG = 256
"""Prompt tokens of a step that is worth looking up from: some 10 ms of an 8B model on a GPU."""
_LOOK = 0.0001
"""Seconds between looks at whether such a step has ended."""
_RETRY_WAIT = 0.05
"""Seconds between attempts while requests wait for pages that no step here will free (pinned or leased ones)."""


class StepLoop:
    """Runs a scheduler against an executor.

    Through `post` (`loop.call_soon_threadsafe`), on the other thread: `deliver` is given the outputs of a step, once
    for each step that has any, and those of commands; `crashed` the exception that ended the loop, if one does, once.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        post: Callable[..., object],
        deliver: Callable[[list[Output]], None],
        crashed: Callable[[BaseException], None],
        receiving: Receiving | None = None,
        metrics: EngineMetrics | None = None,
        clock: Clock = monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics if metrics is not None else EngineMetrics()
        self._receiving = receiving
        self._executor = executor
        self._depth = min(executor.depth, MAX_DEPTH)
        self._post = post
        self._deliver = deliver
        self._crashed = crashed
        self._clock = clock
        self._log = get_logger(__name__)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._launched: deque[tuple[int, int]] = deque()
        """Steps launched and not collected, oldest first, and how many prompt tokens each has."""
        self._load = scheduler.load()
        self._load_at = clock()
        self._turn_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)

    # --- from any thread ---------------------------------------------------------------------------------------------

    @property
    def load(self) -> Load:
        """The load as of the last snapshot: at most a step and a twentieth of a second old."""
        return self._load

    @property
    def turning_for(self) -> float:
        """Seconds that the turn under way has taken; 0 while there is none."""
        began = self._turn_began
        return 0.0 if began is None else max(0.0, self._clock() - began)

    def start(self) -> None:
        """Starts the thread. Call once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step, closes the executor and waits for both. Idempotent."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Hands over `request`; its outputs, a refusal included, come through `deliver`."""
        self.command(lambda: self._submit(request))

    def abort(self, request: Request) -> None:
        """Ends `request`, in the step thread. Nothing more is delivered for it from there."""
        self.command(lambda: self._abort(request))

    def ask(self, function: Callable[[], T], done: Callable[[T], None]) -> None:
        """Runs `function` in the step thread, and posts its result to `done`."""
        self.command(lambda: self._ask(function, done))

    def command(self, command: Callable[[], None]) -> None:
        """Runs `command` in the step thread: before the next step is scheduled, and while a long one is waited for. So
        it finds up to `MAX_DEPTH` steps in flight. It must not raise: that ends the engine."""
        self._inbox.append(command)
        self._wake.set()

    # --- in the step thread ------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """One round: commands, at most one step launched and one collected, outputs. Whether there was a step."""
        self._obey()
        self._tell()
        stepped = self._step()
        self._tell()
        self._note_load(idle=not stepped)
        return stepped

    def attend(self) -> None:
        """Commands, and at once what they have to tell, while a step is waited for."""
        self._obey()
        self._tell()
        self._note_load()

    @property
    def attentive(self) -> bool:
        """Whether the step that is to be collected next is so long that commands run while it is waited for."""
        return bool(self._launched) and self._launched[0][1] >= _LONG

    def _obey(self) -> None:
        self._wake.clear()
        while self._inbox:
            self._inbox.popleft()()
        if self._receiving is not None:
            self._receiving.turn(self._clock())

    def _tell(self) -> None:
        if outputs := self._scheduler.take_outputs():
            self._post(self._deliver, outputs)

    def _note_load(self, *, idle: bool = False) -> None:
        # Not between a step's end and its outputs: whoever ends with it would count, and routers hear of both at once.
        now = self._clock()
        if idle or now - self._load_at >= _SNAPSHOT_INTERVAL:
            self._load = self._snapshot()
            self._load_at = now

    def _snapshot(self) -> Load:
        load = self._scheduler.load()
        if self._receiving is not None and self._receiving.degraded():
            return structs.replace(load, state="degraded")
        return load

    def _step(self) -> bool:
        scheduler = self._scheduler
        began = self._clock()
        plan = scheduler.schedule(self._clock())
        if plan is not None:
            try:
                self._executor.launch(plan)
            except DeviceLost:
                raise
            except Exception as error:  # whatever a device or a library raises: fatal for this step's requests alone
                self._failed(plan.step, error)
            else:
                self._launched.append((plan.step, plan.prompt_tokens))
                self._metrics.step(len(plan.slices), plan.prompt_tokens)
        if self._launched and (plan is None or len(self._launched) >= self._depth):
            self._watch()
            step, _ = self._launched.popleft()
            try:
                result = self._executor.collect()
            except DeviceLost:
                raise
            except Exception as error:  # as above
                self._failed(step, error)
            else:
                ended = self._clock()
                scheduler.complete(result, ended)
                self._metrics.step_ended(ended - began)
            return True
        return plan is not None

    def _watch(self) -> None:
        """Commands, until the step that is to be collected next has ended, where that is a long one."""
        while self.attentive and not self._executor.ended():
            if self._wake.wait(_LOOK):
                self.attend()

    def _failed(self, step: int, error: Exception) -> None:
        self._log.exception("step failed", every=1.0, step=step, error=repr(error))
        self._scheduler.fail(step, InternalError(f"the engine could not compute a step: {error}"))

    def _submit(self, request: Request) -> None:
        try:
            self._scheduler.submit(request, self._clock())
        except MicroserveError as error:
            self._scheduler.refuse(request, error)

    def _abort(self, request: Request) -> None:
        self._scheduler.abort(request)

    def _ask(self, function: Callable[[], T], done: Callable[[T], None]) -> None:
        self._post(done, function())

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn_began = self._clock()
                stepped = self.turn()
                self._turn_began = None
                if not stepped:
                    self._wait()
        except BaseException as error:
            # A bug in the loop itself, whose state is not to be trusted any more, or a lost device.
            self._log.exception("the step thread died", error=repr(error))
            self._post(self._crashed, error)
        finally:
            self._executor.close()

    def _wait(self) -> None:
        timeout = _RETRY_WAIT if self._scheduler.waiting else None
        deadlines = [self._scheduler.next_deadline()]
        if self._receiving is not None:
            deadlines.append(self._receiving.next_deadline())
        for deadline in deadlines:
            if deadline is not None:
                until = max(0.0, deadline - self._clock())
                timeout = until if timeout is None else min(timeout, until)
        self._wake.wait(timeout)
