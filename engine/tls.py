"""Certificates: files on disk -> what gRPC wants; what is wrong is found before anyone listens or asks."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

logger = logging.getLogger(__name__)


class TlsError(ValueError):
    """Certificates that cannot be used: the message names the file or the option and says why."""


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """What a server shows, and of whom it wants to be shown something. PEM files."""

    cert: Path  # with the certificates between it and the root behind it
    key: Path  # unencrypted
    client_ca: Path | None = None  # whose certificates clients must have (mTLS); None: clients need none

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files, now and at a connection after they have changed: a certificate is renewed in place.

        What cannot be used (a certificate whose key has not been written yet) is left until it can, and the
        log says so. Raises TlsError where that is so from the beginning.
        """
        used = self._state()
        complained: object = None

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used, complained
            found: object = None
            try:
                if (found := self._state()) == used:
                    return None
                configuration = self._configuration()
            except (TlsError, OSError) as error:
                if found != complained:
                    logger.error("the certificate in use stays: %s", error)
                complained = found
                return None
            logger.info("%s has changed; new connections get it", self.cert)
            used = found
            return configuration

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            renewed,  # type: ignore[arg-type]  # None says that nothing has changed; the stubs lack that
            require_client_authentication=self.client_ca is not None,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        _check(self.cert, self.key, self.client_ca)
        root = self.client_ca.read_bytes() if self.client_ca else None
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.cert.read_bytes())], root
        )

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        """Return what changes with the files."""
        files = [file for file in (self.cert, self.key, self.client_ca) if file is not None]
        stats = [file.stat() for file in files if file.exists()]
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)


def server_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """Return what the options of a server say; None where it is to have no TLS. Raises TlsError."""
    if cert is None or key is None:
        for name, value, missing in (
            ("tls_cert", cert, "tls_key"),
            ("tls_key", key, "tls_cert"),
            ("tls_client_ca", client_ca, "tls_cert and tls_key"),
        ):
            if value is not None:
                raise TlsError(f"{name} is given without {missing}; expected both")
        return None
    return ServerTls(cert=cert, key=key, client_ca=client_ca)


def client_credentials(
    ca: Path | None, cert: Path | None, key: Path | None
) -> grpc.ChannelCredentials | None:
    """Return what a client trusts and shows; None for a connection without TLS.

    Args:
        ca: whose certificate the server must have.
        cert: the client's own, for a server that wants one.
        key: of `cert`.

    Raises TlsError.
    """
    if (cert is None) != (key is None):
        raise TlsError("tls_cert and tls_key belong together; expected both or neither")
    if ca is None:
        if cert is not None:
            raise TlsError("tls_cert is given without tls_ca; expected the server's authority too")
        return None
    _check(cert, key, ca)
    return grpc.ssl_channel_credentials(
        ca.read_bytes(), key.read_bytes() if key else None, cert.read_bytes() if cert else None
    )


def _check(cert: Path | None, key: Path | None, authority: Path | None) -> None:
    """Raise TlsError unless the files are what they should be: gRPC would only say so call by call."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if cert is not None and key is not None:
        try:
            context.load_cert_chain(cert, key, password=lambda: b"")  # never ask at a terminal
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise TlsError(f"{cert} and {key} are no certificate and its key: {error}") from error
    if authority is not None:
        try:
            context.load_verify_locations(authority)
        except (OSError, ValueError) as error:
            raise TlsError(f"{authority} holds no certificates of an authority: {error}") from error
