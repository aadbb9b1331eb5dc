"""Command lines and configuration: jsonargparse, with errors that name the nearest key."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import jsonargparse

# How jsonargparse words that it does not know a key; the group is the key.
UNKNOWN_KEY = (
    r"(?<=\s)--([\w.]+)(?=.*$)",  # unrecognized arguments: --a.b 3 --c
    r"does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
    r"[Kk]ey ['\"]([\w.]+)['\"] is not expected",
)

CONFIG_HELP = "Options from a YAML file; those after it take precedence."


class HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """jsonargparse's, which leaves the lines of a description as they are: commands stand in them."""


class HelpfulParser:
    """What all our parsers share: help that keeps its lines, and "did you mean" for unknown keys; a mixin."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, with the nearest known key, and exit with 2."""
        unknown = [key for pattern in UNKNOWN_KEY for key in re.findall(pattern, message)]
        suggestion = nearest(unknown, _known_keys(self, message)) if unknown else ""
        super().error(message + suggestion, ex)  # type: ignore[misc]
        raise AssertionError("the parser's error() exits")


class ArgumentParser(HelpfulParser, jsonargparse.ArgumentParser):
    """The parser of every trirank command: no abbreviated options, but `--config` and `--print_config`."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)
        self.add_argument("--config", action="config", help=CONFIG_HELP)


def nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the known name nearest to each unknown one, or "" for none."""
    names = sorted(known)
    # One that is known, and yet not taken, is not what was meant.
    found = [
        match for key in unknown if key not in names for match in difflib.get_close_matches(key, names, n=1)
    ]
    return f"; did you mean {' or '.join(dict.fromkeys(found))}?" if found else ""


def _known_keys(parser: Any, message: str) -> set[str]:
    if class_path := re.search(r"class_path='([\w.]+)\.(\w+)'", message):  # an option of that class
        return set(
            inspect.signature(getattr(importlib.import_module(class_path[1]), class_path[2])).parameters
        )
    keys = {action.dest for action in parser._actions} - {"help", "config", "print_config"}
    # An error inside a group names the key without its group.
    group = re.search(r"Group '([\w.]+)'", message)
    return {key.removeprefix(f"{group[1]}.") for key in keys if key.startswith(group[1])} if group else keys
