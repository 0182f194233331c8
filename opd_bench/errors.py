"""The two errors a user sees, each as one line: one for what the user can mend, one for a run that failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend before trying again; the command line exits with 2."""


class RunError(Exception):
    """A run that started and failed; finished work is kept; the command line exits with 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'opd'?)`` or the list of what is known, to append to an error line."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"
