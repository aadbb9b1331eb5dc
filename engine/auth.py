"""API keys: who a caller is, and what the caller may do.

A key file is JSON and holds no key, only what a key hashes to:

    {"keys": [{"id": "6ZLZX3PK", "name": "storefront", "role": "client", "sha256": "9f86...",
               "created": "2026-11-21T08:01:00+00:00", "requests_per_s": 200.0, "burst": 50.0}]}

A key is "trk_", its id, "_" and 256 random bits. They are hashed with one SHA-256: a slow hash (scrypt)
protects secrets that can be guessed, and nobody guesses 256 random bits, while each request would pay for it,
refused ones too. NIST SP 800-63B (5.1.2.2) asks for no more where a secret has 112 bits or more. A salt would
only keep equal keys apart, and there are none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from engine.admission import RateLimit
from engine.watched import Watched

# Each may do what those before it may: a reader asks, a client records events too.
ROLES = ("reader", "client")
ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"  # without what looks alike
KEY = re.compile(rf"trk_([{ID_ALPHABET}]{{8}})_([A-Za-z0-9_-]{{43}})")
NO_DIGEST = "0" * 64  # of no key


class KeyFileError(ValueError):
    """A key file that cannot be used: the message names the file and says why."""


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What the file knows of one key."""

    id: str  # public: may stand in logs and metrics
    name: str  # whose it is
    role: str  # one of ROLES
    sha256: str  # of the whole key, in hexadecimal
    created: str  # ISO 8601
    requests_per_s: float | None = None  # None: the server's default limit
    burst: float | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role!r}; expected one of {', '.join(ROLES)}")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 is {self.sha256!r}; expected 64 hexadecimal digits")
        if not re.fullmatch(rf"[{ID_ALPHABET}]{{8}}", self.id):
            raise ValueError(f"id is {self.id!r}; expected 8 of the characters {ID_ALPHABET}")
        if (self.requests_per_s is None) != (self.burst is None):
            raise ValueError("requests_per_s and burst belong together; expected both or neither")
        _ = self.rate_limit  # raises where the numbers are none

    @property
    def rate_limit(self) -> RateLimit | None:
        """The key's own limit; None where the default counts."""
        if self.requests_per_s is None or self.burst is None:
            return None
        return RateLimit(self.requests_per_s, self.burst)

    def may(self, role: str) -> bool:
        """Return whether the key is good for what a role may do."""
        return ROLES.index(self.role) >= ROLES.index(role)


class ApiKeys:
    """The keys that a server accepts."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._of_id = {key.id: key for key in keys}

    @classmethod
    def load(cls, path: str | Path) -> ApiKeys:
        """Read a key file. Raises KeyFileError."""
        return cls(_read(Path(path)))

    def __len__(self) -> int:
        return len(self._of_id)

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._of_id.values())

    def find(self, presented: str | None) -> ApiKey | None:
        """Return the key that was presented, or None.

        The digests are compared in constant time. The id is looked up in the open: it is no secret, and for
        an unknown one the work is the same.
        """
        match = KEY.fullmatch(presented or "")
        known = self._of_id.get(match[1]) if match else None
        digest = hashlib.sha256((presented or "").encode()).hexdigest()
        is_right = hmac.compare_digest(digest, known.sha256 if known else NO_DIGEST)
        return known if is_right else None


class KeyFile(Watched[ApiKeys]):
    """A key file that may change while its keys are in use; `load` raises KeyFileError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(lambda: ApiKeys.load(self.path), self._stamp_of_file)

    def _stamp_of_file(self) -> object:
        try:
            found = self.path.stat()
        except OSError as error:
            return type(error).__name__
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def presented_key(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return the key in a call's metadata, None without one.

    It stands in "authorization: Bearer KEY" or "x-api-key: KEY".
    """
    for name, value in metadata:
        if not isinstance(value, str):
            continue
        if name.lower() == "x-api-key":
            return value.strip()
        if name.lower() == "authorization":
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
    return None


def create_key(
    path: str | Path,
    name: str,
    *,
    role: str = "client",
    rate_limit: RateLimit | None = None,
    now: datetime | None = None,
) -> str:
    """Add a new key to a key file, which is made where it is missing, and return the key.

    It is shown this once: the file cannot give it back. Raises KeyFileError, and ValueError for a bad role.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _changing(path):
        known = _read(path) if path.exists() else []
        taken = {key.id for key in known}
        while (key_id := "".join(secrets.choice(ID_ALPHABET) for _ in range(8))) in taken:
            pass
        key = f"trk_{key_id}_{secrets.token_urlsafe(32)}"
        entry = ApiKey(
            id=key_id,
            name=name,
            role=role,
            sha256=hashlib.sha256(key.encode()).hexdigest(),
            created=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
            requests_per_s=rate_limit.per_s if rate_limit else None,
            burst=rate_limit.burst if rate_limit else None,
        )
        _write(path, [*known, entry])
    return key


def remove_key(path: str | Path, key_id: str) -> None:
    """Take a key out of a key file. Raises KeyFileError where it has no key of this id."""
    path = Path(path)
    with _changing(path):
        known = _read(path)
        kept = [key for key in known if key.id != key_id]
        if len(kept) == len(known):
            raise KeyFileError(f"{path} has no key {key_id!r}; it has {', '.join(key.id for key in known)}")
        _write(path, kept)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Let one process at a time read a key file and replace it. KeyFileError where its directory is none.

    The lock is the directory: the file itself is another one once it has been replaced.
    """
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KeyFileError(f"{path.parent} cannot be opened: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> list[ApiKey]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path} cannot be read: {error}") from error
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise KeyFileError(f"{path} is no key file: it has no list `keys`")
    keys: list[ApiKey] = []
    for place, entry in enumerate(entries):
        try:
            unknown = set(entry) - {field.name for field in fields(ApiKey)}
            if unknown:
                raise ValueError(f"unknown fields {sorted(unknown)}")
            keys.append(ApiKey(**entry))
        except (TypeError, ValueError) as error:
            raise KeyFileError(f"{path}: keys[{place}]: {error}") from error
    if len({key.id for key in keys}) != len(keys):
        raise KeyFileError(f"{path} has two keys of one id; expected each id once")
    return keys


def _write(path: Path, keys: Iterable[ApiKey]) -> None:
    """Replace the file at once: a new one readable by its owner alone, another as the old one was."""
    entries = [{name: value for name, value in asdict(key).items() if value is not None} for key in keys]
    descriptor, draft = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            if path.exists():  # the server that reads it may be another user than who changes it
                before = path.stat()
                with contextlib.suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
            json.dump({"keys": entries}, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
