"""Chooses, once and aloud, what takes the sums over the vocabulary: a compiled pass or torch's own.

Compiling takes seconds and needs a C++ compiler (Triton on a GPU), so a small job does without.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prift import native
from prift.errors import ModelError, first_line
from prift.fold import compiled_sums
from prift.stats import tile_sums

WORTH_COMPILING = 10**10  # logits: what a pass saves on a CPU over them is about what it costs


def tell_products(dtype: torch.dtype, device: torch.device, say: Callable[[str], None]) -> None:
    """Says where bfloat16 weights must be widened, which is slow."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not native.supports(dtype):
        say(
            "output projection: widened to float32, several times slower: there is no C++ compiler "
            "(install g++), or this processor lacks the instructions"
        )


def choose_sums(
    device: torch.device, logits: int, wanted: bool | None, say: Callable[[str], None]
) -> Callable[..., Tensor]:
    """`tile_sums`, or its compiled form; says which in one line.

    logits  how many will be folded, roughly: rows x vocabulary
    wanted  True: compile or fail; False: do not; None: where it pays and works

    Raises ModelError where compiling is wanted and fails.
    """
    if wanted is None and device.type == "cpu" and logits < WORTH_COMPILING:
        say("statistics: not compiled, since the data are few")
        return tile_sums
    if wanted is False:
        say("statistics: not compiled, as asked")
        return tile_sums
    try:
        with torch.inference_mode():  # as the scorers run
            compiled = compiled_sums(device.type)
    except Exception as error:  # whatever a machine's compilers and their caches may raise
        reason = f"torch.compile failed ({type(error).__name__}: {first_line(error)})"
        if wanted:
            raise ModelError(f"{reason}. Use --no-compile, or install a C++ compiler.") from error
        say(f"statistics: not compiled, so somewhat slower: {reason}")
        return tile_sums
    say("statistics: one compiled pass over tiles of the output projection")
    return compiled
