"""Options of layers and models that are chosen by name."""

from __future__ import annotations

from collections.abc import Collection


def check_choice(option: str, name: object, names: Collection) -> None:
    """Raise ValueError unless the name given for an option is one of those that it has."""
    if name not in names:
        raise ValueError(f"{option} must be {' or '.join(map(repr, names))}, got {name!r}")
