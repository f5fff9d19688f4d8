"""Settings of a script: one home for each, a default, a flag, a check; typos are refused."""

from __future__ import annotations

import argparse
import difflib
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict


class SettingsParser(argparse.ArgumentParser):
    """An argument parser that proposes the nearest known flag for an unknown one."""

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return known


def parse_settings(
    defaults: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    description: str,
    check: Callable[[EasyDict], None],
    args: Sequence[str] | None = None,
) -> EasyDict:
    """The settings of a run: defaults, overridden by those of the preset, overridden by flags of the command line.

    Args:
        defaults: every setting, with `preset` among them if there are presets; the type of a default is the type of its
            flag.
        presets: settings by name of preset; a preset may only name settings that are in `defaults`.
        description: help text, the docstring of the script.
        check: raises ValueError for values that make no sense. In the file where it is defined, the comment at the end
            of a line `key=default,  # comment` is the help text of the flag.
        args: command line, that of the process by default.

    Exits with status 2 and a message for an unknown flag or a value that does not fit.
    """
    parser = SettingsParser(
        usage="%(prog)s [--help] [--SETTING VALUE ...]",  # or every message would come after twenty lines of flags
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = "".join(linecache.getlines(check.__code__.co_filename)).replace("%", "%%")
    sentences = dict(re.findall(r"^ +(\w+)=.*,  # (.*)$", source, re.MULTILINE))
    if presets:
        parser.add_argument("--preset", choices=list(presets), default=defaults["preset"], help=sentences.get("preset"))
    for key, default in defaults.items():
        if key == "preset":
            continue
        kind = _parse_bool if isinstance(default, bool) else type(default)
        by_preset = "".join(f", {name}: {preset[key]}" for name, preset in presets.items() if key in preset)
        sentence = f"{sentences.get(key, '')} (default {default or repr(default)}{by_preset})"
        parser.add_argument(
            f"--{key}", type=kind, default=argparse.SUPPRESS, metavar=type(default).__name__, help=sentence
        )
    given = vars(parser.parse_args(args))
    preset = presets[given["preset"]] if presets else {}
    if unknown := set(preset) - set(defaults):
        raise KeyError(f"preset {given['preset']} names unknown settings {sorted(unknown)}")
    settings = EasyDict({**defaults, **preset, **given})
    try:
        check(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings


def require(settings: Mapping[str, Any], lowest: Mapping[str, float]) -> None:
    """Raise ValueError unless each of the settings named is a number of at least its lowest value."""
    for key, low in lowest.items():
        if not low <= settings[key] < float("inf"):
            raise ValueError(f"{key} must be at least {low}, got {settings[key]}")


def require_seed(settings: Mapping[str, Any], key: str) -> None:
    """Raise ValueError unless a setting can start all random generators, NumPy's included."""
    if not 0 <= settings[key] < 2**32:
        raise ValueError(f"{key} must be in 0 … 2^32 - 1, got {settings[key]}")


def require_file_name(settings: Mapping[str, Any], key: str) -> None:
    """Raise ValueError unless a setting can be part of a file name: without directories."""
    if not settings[key] or Path(settings[key]).name != settings[key]:
        raise ValueError(f"{key} must be a name for files, without directories, got {settings[key]!r}")


def _parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]
