"""The command line: click only, thin over the library, and quick to print its help.

Heavy packages (torch, transformers, pyarrow) are imported inside the commands that use them.
"""

import click

from prift import __version__

from .cache_move import cache  # with the commands of both files
from .export import export
from .precompute import precompute
from .rules import rules
from .train import train
from .weigh import weigh


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="prift")
def main() -> None:
    """Fine-tune with token weights from the pretrained model, computed once and cached.

    \b
    prift precompute   runs the pretrained model once over the data and stores, per token,
                       what it thought: statistics, not weights
    prift weigh        shows what a rule would do to the data, before anything is trained
    prift train        trains with any rule that turns those statistics into weights;
                       no reference model is loaded
    prift cache        looks at what lies in the cache, checks it, shares it
    prift rules        lists the weighting rules and what each reads
    """


main.add_command(precompute)
main.add_command(weigh)
main.add_command(train)
main.add_command(cache)
main.add_command(rules)
cache.add_command(export)
