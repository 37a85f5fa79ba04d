"""TLS of the HTTP server: a certificate that can be renewed while it serves."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.runtime.errors import ConfigError
from microserve.runtime.keys import check_secret, file_stamp
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from microserve.runtime.settings import RouterConfig

_log = get_logger(__name__)


class Certificate:
    """The certificate of a server, and the TLS context that presents it."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Raises `ConfigError`: not there, no certificate, not its key, or a key that others may read."""
        self._cert, self._key = cert, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._stamp = self._stamps()
        load(self.context, cert, key)

    def look(self) -> None:
        """Presents another certificate to new connections when the files have changed. One that cannot be used is told,
        and the old one stays."""
        stamp = self._stamps()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            # First elsewhere: a context whose loading fails halfway would be of no use.
            load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._cert, self._key)
            load(self.context, self._cert, self._key)
        except ConfigError as error:
            _log.error("the certificate was not read again; the old one stays", error=error.message)
        else:
            _log.info("certificate read again", file=self._cert)

    def _stamps(self) -> tuple[object, object]:
        return file_stamp(self._cert), file_stamp(self._key)


def load(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Raises `ConfigError` in one line."""
    check_secret(key)
    try:
        # Without a prompt: a daemon has nobody to ask for a passphrase.
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise ConfigError(f"tls_cert {cert}, tls_key {key}: {reason}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"tls_cert {cert}, tls_key {key}: {error}") from error


def load_certificate(config: RouterConfig) -> Certificate | None:
    """What the configuration says; None for plain HTTP. Raises `ConfigError`."""
    if config.tls_cert is None and config.tls_key is None:
        return None
    if config.tls_cert is None or config.tls_key is None:
        missing = "tls_cert" if config.tls_cert is None else "tls_key"
        raise ConfigError(f"{missing} is not set: TLS needs a certificate and its key")
    return Certificate(Path(config.tls_cert), Path(config.tls_key))
