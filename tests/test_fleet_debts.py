"""Claims whose holder cannot go on, and must say so all the same: pages at the receiver wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.fleet_checks import LONG, link_of, raises
from tests.fleet_rig import run_fleet

from microserve.kv.transfer.base import LinkReport
from microserve.kv.transfer.loopback import LoopbackConnecting, LoopbackTransport
from microserve.runtime.errors import Cancelled, TransferFailed
from microserve.runtime.messages import Claimed

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest
    from tests.fleet_rig import Fleet


def test_a_link_that_is_refused_later_ends_its_claims_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "local"
    really = LoopbackTransport.connect

    def connect(self: LoopbackTransport, peer: str, metadata: bytes) -> LoopbackConnecting:
        report = really(self, peer, metadata).poll()
        assert report is not None
        return LoopbackConnecting(LinkReport(kind, error=report.error))

    monkeypatch.setattr(LoopbackTransport, "connect", connect)

    async def work(fleet: Fleet) -> None:
        nonlocal kind
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        # The push fails, and the way that is found next is not the one that is demanded.
        fleet.hub.failing.add((a.transport_name, b.transport_name))
        kind = "tcp"
        await raises(TransferFailed, fleet.remote_send(a, LONG, kv))
        await fleet.until(lambda: link_of(a, "b").state == "refused", limit=20)
        await fleet.release(b, kv)
        assert (b.quarantined(), b.core.steps.load.state) == (0, "ready")

    run_fleet(work, require_link="local")


def test_a_send_to_oneself_that_is_aborted_as_its_claim_is_granted() -> None:
    async def work(fleet: Fleet) -> None:
        a = fleet["a"]
        kv = await fleet.prep_recv(a, LONG, end=-1)
        ask = a.core.steps.ask

        def asking(work: Callable[[], Any], answered: Callable[[Any], None]) -> None:
            def then(result: Any) -> None:
                answered(result)
                if isinstance(result, Claimed):
                    # In the same turn of the loop, behind the answer.
                    a.core.verbs._end(next(iter(a.core.verbs._book._open)), Cancelled("enough"))

            ask(work, then)

        a.core.steps.ask = asking  # type: ignore[method-assign, assignment]
        await raises(Cancelled, fleet.sending(a, LONG, kv))
        assert await fleet.release(a, kv) == "freed"
        assert a.quarantined() == 0

    run_fleet(work)
