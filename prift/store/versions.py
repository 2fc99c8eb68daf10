"""Which versions of the statistics' definitions there were, and what each of them changed.

The version is in a prior's identity, so raising it makes a new prior. What was scored before stays
readable for the statistics whose definitions have stayed.
"""

STATS_VERSION = 1
"""Raised when the definition of an existing statistic changes, never when one is added."""

CHANGED: dict[int, frozenset[str]] = {}
"""Version -> the statistics that it defined anew: a line for every version but the first."""


def changed_since(version: int) -> frozenset[str]:
    """Statistics whose values under this version are not what they are now."""
    return frozenset().union(*(names for v, names in CHANGED.items() if v > version))
