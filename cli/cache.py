"""`prift cache`: what lies in a cache, and whether it is sound."""

import click

from .command import Group


@click.group(cls=Group)
def cache() -> None:
    """Look at a cache, check it, share it."""
