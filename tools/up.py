"""`microserve up`: a router and engines on this machine, supervised, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.config import EngineConfig, RouterConfig, check_tables, load_config
from microserve.runtime.errors import ConfigError
from microserve.runtime.models import resolve_model
from microserve.runtime.service import EXIT_CONFIG
from microserve.tools.common import command_parser
from microserve.tools.ports import check_http_port, check_tcp_endpoint
from microserve.tools.supervisor import ChildSpec

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence


def main(argv: Sequence[str]) -> int:
    """The command; its exit code: 0 after Ctrl-C, 2 when a process refuses its configuration, 130 after two Ctrl-C."""
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown)}")
    try:
        plan = Plan(options, os.environ)
        plan.check()
    except ConfigError as error:
        print(f"microserve up: error: {error.message}", file=sys.stderr)
        return EXIT_CONFIG
    # Imported here: `--help` and configuration errors need neither the bus nor a screen.
    from microserve.tools.up_run import Up

    screen = sys.stdout.isatty() and not options.plain
    with asyncio.Runner() as runner:
        return runner.run(Up(plan, screen=screen).run())


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "up",
        "Run a router and engines on this machine, and keep them running until Ctrl-C (which lets running requests "
        "finish; a second Ctrl-C does not).",
    )
    parser.add_argument("--model", metavar="PATH", help="checkpoint folder or bundled model (default: demo)")
    parser.add_argument("--engines", type=int, default=2, metavar="N", help="how many engines (default: 2)")
    parser.add_argument("--http-host", metavar="HOST", help="address of the HTTP server (default: 127.0.0.1)")
    parser.add_argument("--http-port", metavar="PORT", help="port of the HTTP server (default: 8000)")
    parser.add_argument(
        "--bind", metavar="ENDPOINT", help="where the router's bus listens (default: tcp://127.0.0.1:7700)"
    )
    parser.add_argument("--executor", metavar="NAME", help="what engines compute with: auto, cuda, torch or fake")
    parser.add_argument("--threads", metavar="N", help="CPU threads of each engine (default: this machine's, shared)")
    parser.add_argument("--strategy", metavar="NAME", help="the router's strategy (default: data_parallel)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with tables [engine] and [router] for everything else"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="also write each process's lines to DIR/NAME.log")
    parser.add_argument("--plain", action="store_true", help="print lines, even on a terminal")
    return parser


_OWN = ("engine_id", "events_bind", "router_id", "routers")
"""Settings that every daemon of ours is told by us, whatever else is said."""


def _meant(unknown: Sequence[str]) -> str:
    """Where the first of these flags that a daemon has is said to all of them."""
    for kind, cls in (("engine", EngineConfig), ("router", RouterConfig)):
        for flag in unknown:
            name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
            if flag.startswith("--") and name in cls.__struct_fields__ and name not in _OWN:
                variable = f"MICROSERVE_{kind.upper()}_{name.upper()}"
                return f"; {name} is the {kind}s': set {variable}, or put it under [{kind}] in a file for --config"
    return ""


class Plan:
    """What is to run. Made from options, environment and file; raises `ConfigError` before anything starts."""

    def __init__(self, options: argparse.Namespace, environ: Mapping[str, str]) -> None:
        if not 0 <= options.engines <= 1024:
            raise ConfigError(f"--engines: {options.engines} is not a number of engines from 0 to 1024")
        self.engines: int = options.engines
        self.logs: Path | None = options.logs
        self._file: Path | None = options.config
        if self._file is not None:
            check_tables(self._file)
        engine_flags = {"model": options.model, "executor": options.executor, "threads": options.threads}
        router_flags = {
            "http_host": options.http_host,
            "http_port": options.http_port,
            "bind": options.bind,
            "strategy": options.strategy,
        }
        self.engine = load_config(EngineConfig, file=self._file, environ=environ, flags=engine_flags)
        self.router = load_config(RouterConfig, file=self._file, environ=environ, flags=router_flags)
        self._engine_flags = {name: value for name, value in engine_flags.items() if value is not None}
        self._router_flags = {name: value for name, value in router_flags.items() if value is not None}

    @property
    def router_endpoint(self) -> str:
        """Where this machine's processes reach the router's bus."""
        return self.router.bind.replace("//0.0.0.0:", "//127.0.0.1:").replace("//*:", "//127.0.0.1:")

    @property
    def engine_names(self) -> list[str]:
        return [f"engine-{number}" for number in range(self.engines)]

    def check(self) -> None:
        """Find out what would fail later: a missing model, a port that is taken. Raises `ConfigError`."""
        if self.router.bind.endswith((":*", ":0")):
            raise ConfigError(f"bind: {self.router.bind} has no fixed port, so engines could not be told of it")
        if self.engine.executor != "fake" and self.engines:
            # Before the ports: it stays wrong when those are free. And once, here: engines that start together would
            # each make a missing demo model.
            resolve_model(self.engine.model)
        problems = []
        for check in (
            partial(check_http_port, self.router.http_host, self.router.http_port),
            partial(check_tcp_endpoint, self.router.bind),
        ):
            try:
                check()
            except ConfigError as error:
                problems.append(error.message)
        if problems:
            # Both at once: another fleet on this machine has taken both.
            raise ConfigError("; ".join(problems))
        if self.logs is not None:
            try:
                self.logs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--logs: {self.logs} cannot be a folder: {error.strerror}") from error

    def specs(self) -> list[ChildSpec]:
        """The processes to run, the router first; watched as the systemd units have it."""
        router = ChildSpec(
            "router", "microserve.router", self._arguments(self._router_flags, router_id="local"), watchdog=20.0
        )
        return [router, *(self._engine_spec(name) for name in self.engine_names)]

    def _engine_spec(self, name: str) -> ChildSpec:
        flags = self._engine_flags
        if self.engine.threads is None:
            flags = {**flags, "threads": str(max(1, usable_cores() // self.engines))}
        arguments = self._arguments(flags, engine_id=name, routers=self.router_endpoint)
        # Each takes its own ports: a fixed one of the file could serve only one of them.
        arguments += ("--bind", "tcp://127.0.0.1:*", "--events-bind", "tcp://127.0.0.1:*")
        return ChildSpec(name, "microserve.engine", arguments, watchdog=60.0)

    def _arguments(self, flags: Mapping[str, str], **more: str) -> tuple[str, ...]:
        arguments = ["--config", str(self._file)] if self._file is not None else []
        for name, value in {**flags, **more}.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        return tuple(arguments)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
