"""Errors that a user can mend, and the sentence that says how."""

import difflib
from collections.abc import Iterable


class BenchError(Exception):
    """A bad request: one sentence with the value, what is allowed and the remedy. Exit status 2."""


class PluginError(Exception):
    """An exception inside a plugin's own code; the run fails with exit status 1 and the matrix goes on."""


class ProcessLost(PluginError):
    """Another process of the same training has ended; so does this one, with exit status 1."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a misspelt one, or None if nothing is close."""
    lowered = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def unknown(kind: str, name: str, known: Iterable[str]) -> BenchError:
    """The error for a name that does not exist: the nearest match and the list of what does."""
    names = sorted(known)
    guess = nearest(name, names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    plural = kind + ("es" if kind.endswith("s") else "s")
    return BenchError(f"unknown {kind} {name!r}.{hint} Known {plural}: {', '.join(names)}.")
