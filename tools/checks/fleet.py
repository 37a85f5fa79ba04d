"""The fleet, over the bus: whether routers and engines answer, agree, and reach each other."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

import microserve
from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import (
    ConfigError,
    Forbidden,
    MicroserveError,
    NotFound,
    PeerLost,
    Unauthorized,
    VersionMismatch,
)
from microserve.runtime.messages import PROTOCOL_VERSION, FleetEngine, InfoReply, StatsReply, StatusReply
from microserve.tools.checks.finding import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from microserve.runtime.messages import EngineInfo, Layout
    from microserve.tools.checks.finding import Finding


@dataclass(slots=True)
class Seen:
    """What one router said, and what its engines said through it."""

    endpoint: str
    status: StatusReply | None = None
    infos: dict[str, InfoReply] = field(default_factory=dict)
    stats: dict[str, StatsReply] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """Why an engine did not answer, by its id."""
    findings: list[Finding] = field(default_factory=list)


async def look_at_fleet(
    endpoints: Sequence[str], key_file: str | None, *, seconds: float, expected: bool = True
) -> list[Seen]:
    """Asks every router, and through each those engines that no router before it knew. Takes 0.7 of `seconds` at most.

    `expected`: whether somebody said that there is a router; else its absence is no problem.
    """
    clients = [AsyncClient(each, connect_timeout=0.3 * seconds, key_file=key_file) for each in endpoints]
    try:
        found = await asyncio.gather(
            *(_ask(*each, 0.35 * seconds, expected) for each in zip(clients, endpoints, strict=True))
        )
        asked: set[tuple[str, int]] = set()
        work = []
        for client, seen in zip(clients, found, strict=True):
            for engine in seen.status.engines if seen.status is not None else ():
                if (who := (engine.info.engine_id, engine.info.epoch)) not in asked:
                    asked.add(who)
                    work.append(_ask_engine(client, seen, engine, 0.35 * seconds))
        await asyncio.gather(*work)
    finally:
        await asyncio.gather(*(client.close() for client in clients))
    return found


async def _ask(client: AsyncClient, endpoint: str, seconds: float, expected: bool) -> Seen:
    seen = Seen(endpoint)
    try:
        async with asyncio.timeout(seconds):
            seen.status = await client.status()
    except TimeoutError:
        words = f"the router at {endpoint} does not answer within {seconds:.1f} s"
        seen.findings.append(problem("router", words, "see its log: it is overloaded, stopped, or its loop hangs"))
    except MicroserveError as error:
        seen.findings.append(unanswered(endpoint, error, expected=expected))
    return seen


def unanswered(endpoint: str, error: MicroserveError, *, expected: bool = True) -> Finding:
    """Why a router did not answer, and what to do."""
    words = error.message if endpoint in error.message else f"{endpoint}: {error.message}"
    if isinstance(error, ConfigError):
        return problem("router", words, "give a key file that can be used: --key-file, or $MICROSERVE_KEY_FILE")
    if isinstance(error, Unauthorized | Forbidden):
        advice = "give your key with --key-file (see `microserve keys list`), and see that it is a router's bus at all"
        return problem("router", words, advice)
    if isinstance(error, VersionMismatch):
        advice = f"install the same version in both places; here it is {microserve.__version__}"
        return problem("router", words, advice)
    if isinstance(error, PeerLost):
        advice = (
            "`systemctl status microserve-router`, or start one: `microserve up`; give another endpoint with "
            "--router; a router that wants keys answers nobody without --key-file"
        )
        return problem("router", words, advice) if expected else note("router", words, advice)
    return problem("router", words, "see the router's log")


async def _ask_engine(client: AsyncClient, seen: Seen, engine: FleetEngine, seconds: float) -> None:
    name = engine.info.engine_id
    remote = client.engine(name)
    try:
        async with asyncio.timeout(seconds):
            seen.infos[name] = await remote.info()
            seen.stats[name] = await remote.stats()
    except TimeoutError:
        seen.errors[name] = f"does not answer within {seconds:.1f} s"
    except Forbidden as error:
        seen.errors[name] = f"may not be asked: {error.message}"
    except NotFound:
        seen.errors[name] = "has left meanwhile"
    except MicroserveError as error:
        seen.errors[name] = f"does not answer: {error.message}"


# --- what it means -------------------------------------------------------------------------------------------------


def judge_fleet(found: Sequence[Seen]) -> list[Finding]:
    """Everything that can be said of what was seen."""
    findings = [finding for seen in found for finding in seen.findings]
    for seen in found:
        if seen.status is not None:
            findings += _judge_router(seen, seen.status)
    statuses = [seen.status for seen in found if seen.status is not None]
    findings += judge_routers(statuses)
    for seen in found:
        engines = seen.status.engines if seen.status is not None else []
        for engine in sorted(engines, key=lambda each: each.info.engine_id):
            name = engine.info.engine_id
            if name in seen.infos or name in seen.errors:
                findings += judge_engine(engine, seen.infos.get(name), seen.stats.get(name), seen.errors.get(name, ""))
    known = {engine.info.engine_id: engine.info for status in statuses for engine in status.engines}
    findings += judge_layouts(known[name] for name in sorted(known))
    return findings


def _judge_router(seen: Seen, status: StatusReply) -> list[Finding]:
    shown = f"router {status.router} answers at {seen.endpoint}, version {status.version}"
    findings = [ok("router", f"{shown}, {len(status.engines)} {'engine' if len(status.engines) == 1 else 'engines'}")]
    if status.version != microserve.__version__:
        words = f"router {status.router} is of version {status.version}, and this is {microserve.__version__}"
        findings.append(note("versions", words, "install the same version everywhere, and restart one after the other"))
    else:
        findings.append(ok("versions", f"router {status.router} and this are of version {status.version}"))
    if not status.engines:
        advice = f"start one: `microserve engine --routers {seen.endpoint}`; see its log when it does not join"
        findings.append(note("engines", f"router {status.router} knows no engine: it serves nothing", advice))
    return findings


def judge_routers(statuses: Sequence[StatusReply]) -> list[Finding]:
    """Whether several routers do the same, and see the same engines."""
    findings = []
    strategies = {status.router: status.strategy for status in statuses}
    if len(set(strategies.values())) > 1:
        listed = ", ".join(f"{strategy} on {router}" for router, strategy in strategies.items())
        words = f"routers serve by different strategies: {listed}"
        findings.append(note("router", words, "`microserve strategy set`, with --router, on each"))
    seen = {status.router: {engine.info.engine_id for engine in status.engines} for status in statuses}
    everyone: set[str] = set().union(*seen.values())
    for router, engines in seen.items():
        if missing := everyone - engines:
            words = f"router {router} does not know {', '.join(sorted(missing))}, which others do"
            findings.append(note("router", words, "name every router in the `routers` of each engine"))
    return findings


_STATES = {
    "silent": ("its heartbeats do not come", "see its log, and `systemctl status`: it hangs, or the network does"),
    "degraded": (
        "pages have been in quarantine for over a minute",
        "a sender vanished without proof of its death: start it again under its name, or restart this engine",
    ),
}


def judge_engine(
    engine: FleetEngine, info: InfoReply | None, stats: StatsReply | None, error: str = ""
) -> list[Finding]:
    """One engine, as its router sees it and as it sees itself."""
    name, load = engine.info.engine_id, engine.load
    state = engine.state if info is None or engine.state == "silent" else info.load.state
    findings: list[Finding] = []
    if error:
        status = note if error.startswith(("may not", "has left")) else problem
        advice = "see its log; `microserve engines` shows what its router knows of it"
        findings.append(status("engines", f"engine {name} {error}", advice))
    if state in _STATES:
        why, advice = _STATES[state]
        findings.append(problem("engines", f"engine {name} is {state}: {why}", advice))
    elif state != "ready":
        advice = f"`microserve resume {name}`, when it is to serve again" if state == "draining" else "wait a moment"
        findings.append(note("engines", f"engine {name} is {state}: it gets no new work", advice))
    elif not error:
        words = f"engine {name} answers: {engine.info.model.name}, {engine.info.executor}, {load.running} running"
        findings.append(ok("engines", words))
    if stats is not None and stats.integrity != "ok":
        words = f"engine {name} finds its pages in disorder: {stats.integrity}"
        findings.append(problem("engines", words, "keep its log, restart it, and report this: it is a bug"))
    if engine.info.layout.protocol != PROTOCOL_VERSION:
        words = f"engine {name} speaks protocol {engine.info.layout.protocol}, and we speak {PROTOCOL_VERSION}"
        findings.append(problem("versions", words, "install the same version everywhere"))
    if info is not None:
        findings += _judge_links(name, info)
    return findings


def _judge_links(name: str, info: InfoReply) -> list[Finding]:
    findings, ready = [], []
    for link in info.links:
        words = f"link of engine {name} to {link.engine_id} is {link.state}" + (
            f": {link.detail}" if link.detail else ""
        )
        if link.state == "ready":
            speed = f", {link.gigabytes_per_second:.1f} GB/s" if link.gigabytes_per_second else ""
            ready.append(f"{link.engine_id} ({link.transport or 'unknown'}{speed})")
            if link.failures:
                words = f"link of engine {name} to {link.engine_id}: {link.failures:,} pushes have failed"
                findings.append(note("links", words, f"`microserve events`, and the log of {name}, say why"))
        elif link.state == "refused":
            advice = "make the layouts agree (see `layouts`), or allow what carries KV there: require_link, ucx_devices"
            findings.append(problem("links", words, advice))
        elif link.state == "lost":
            advice = f"is {link.engine_id} gone for good? Else see its log, and that {name} can reach its endpoint"
            findings.append(note("links", words, advice))
        else:
            findings.append(note("links", words, "wait a moment; see the log of both when it stays so"))
    if ready:
        findings.insert(0, ok("links", f"engine {name} can send KV to {', '.join(ready)}"))
    return findings


def judge_layouts(engines: Iterable[EngineInfo]) -> list[Finding]:
    """Whether the engines of each model have pages of the same shape: else they exchange none."""
    by_model: defaultdict[str, list[EngineInfo]] = defaultdict(list)
    for engine in engines:
        by_model[engine.model.name].append(engine)
    findings = []
    for model, members in by_model.items():
        if len(members) < 2:
            continue
        if differences := list(_differences(members)):
            advice = "the same checkpoint, page_size, dtype and version for each; until then each serves for itself"
            words = f"engines of {model} exchange no KV: {'; '.join(differences)}"
            findings.append(problem("layouts", words, advice))
        else:
            layout = members[0].layout
            words = f"{len(members)} engines of {model} agree: {layout.page_size} tokens a page, {layout.dtype}"
            findings.append(ok("layouts", words))
    return findings


def _differences(members: Sequence[EngineInfo]) -> Iterable[str]:
    for name in msgspec.structs.fields(members[0].layout):
        users: defaultdict[object, list[str]] = defaultdict(list)
        for engine in members:
            users[_value(engine.layout, name.name)].append(engine.engine_id)
        if len(users) > 1:
            told = (f"{value} on {', '.join(who)}" for value, who in users.items())
            yield f"{name.name} is {' and '.join(told)}"


def _value(layout: Layout, name: str) -> object:
    return getattr(layout, name)
