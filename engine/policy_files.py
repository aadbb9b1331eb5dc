"""Policies that may change while they are served: a file or a directory, and whether it changed since."""

from __future__ import annotations

from pathlib import Path

from reranking.policy import Policies, PolicyError, load_policies, policy_files


class PolicyFiles:
    """A YAML file of policies, or a directory of such files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.current: Policies | None = None  # as last loaded
        self._loaded: object = None

    def load(self) -> Policies:
        """Read the policies; PolicyError or OSError where that cannot be done."""
        stamp = self._stamp()  # before reading: what changes meanwhile counts as a change
        self._loaded = None
        try:
            self.current = load_policies(self.path)
        except PolicyError:
            self._loaded = stamp
            raise
        self._loaded = stamp
        return self.current

    def changed(self) -> bool:
        """Return whether a file was changed, added or taken away since the last load, or not read then."""
        return self._stamp() != self._loaded

    def _stamp(self) -> object:
        try:
            return [
                (file.name, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
                for file in policy_files(self.path)
                for stat in [file.stat()]
            ]
        except OSError as error:
            return type(error).__name__
