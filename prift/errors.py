"""Errors a user can mend. Every message says what is wrong, what was found, and what to do.

The library raises these; only the command line turns them into an exit code. Anything else that
escapes is a bug in prift and keeps its traceback.
"""


class PriftError(Exception):
    """Base of all errors that the user, not prift, has to mend."""


def first_line(error: Exception) -> str:
    """An error's first line, or its kind where it says nothing; without the full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class OptionError(PriftError):
    """Options that contradict each other, are unknown, or need something that is not installed."""


class DataError(PriftError):
    """A dataset, a row, or a tokenizer that cannot be turned into training examples."""


class ModelError(PriftError):
    """A model that cannot be loaded, or that answers with something that is not a distribution."""


class CacheError(PriftError):
    """A cache that is damaged, is not writable, or holds another prior than the one asked for."""


class MissingPrior(CacheError):
    """The cache is sound but does not hold the statistics asked for."""


class Interrupted(PriftError):
    """A signal ended the run after a checkpoint was written. `signal` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
