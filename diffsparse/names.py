"""Lists of names for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str:
    """The known names, those that look like `name` first."""
    rest = sorted(known)
    near = get_close_matches(name, rest, n=3)
    return ", ".join(near + [other for other in rest if other not in near])
