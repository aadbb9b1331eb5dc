"""Policies that may change while they are served: a file or a directory, and whether it changed since."""

from __future__ import annotations

from pathlib import Path

from engine.watched import Watched
from reranking.policy import Policies, load_policies, policy_files


class PolicyFiles(Watched[Policies]):
    """A YAML file of policies, or a directory of such files; `load` raises PolicyError or OSError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.current: Policies | None = None  # as last loaded
        super().__init__(self._read_files, self._stamp_of_files)

    def _read_files(self) -> Policies:
        self.current = load_policies(self.path)
        return self.current

    def _stamp_of_files(self) -> object:
        try:
            return [
                (file.name, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
                for file in policy_files(self.path)
                for stat in [file.stat()]
            ]
        except OSError as error:
            return type(error).__name__
