"""What must hold between the vLLM backend and transformers, for any model in float32."""

from collections.abc import Sequence

import numpy as np

from prift.backends import Scorer
from prift.stats import CORE
from tests.vllm import brackets
from tests.vllm.brackets import CLOSE
from tests.vllm.scorers import scores

THRESHOLDS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def check_parity(
    vllm: Scorer,
    hf: Scorer,
    folder: str,
    sequences: Sequence[np.ndarray],
    apart_share: float = 0.85,
) -> None:
    """Every statistic at every position of the sequences.

    folder       the model that transformers' full logits come from
    apart_share  of the positions, at least, have no near-tie, so that ranks are compared
    """
    ours = scores(vllm, sequences)
    longer = [i for i, ids in enumerate(sequences) if len(ids) > 1]
    nothing = {name: np.zeros(0) for name in CORE}
    theirs = [nothing for _ in sequences]
    for i, stats in zip(longer, scores(hf, [sequences[i] for i in longer]), strict=True):
        theirs[i] = stats
    compared = positions = alone = 0
    for i, allowed in enumerate(brackets.of_model(folder, sequences)):
        one, other, where = ours[i], theirs[i], f"sequence {i}"
        assert len(one["rank"]) == len(sequences[i]) - 1
        brackets.check(one, allowed, where)
        brackets.check(other, allowed, f"{where} of transformers")
        for name in ("logprob", "entropy"):
            assert np.abs(one[name] - other[name]).max(initial=0) <= CLOSE, f"{where}: {name}"
        apart = allowed.near == 0
        assert (one["rank"] == other["rank"])[apart].all(), where
        compared += brackets.check_decisions(
            one["log_mass_rank"], other["log_mass_rank"], allowed, THRESHOLDS
        )
        positions += len(apart)
        alone += int(apart.sum())
    # The brackets leave little open, so that the above says something.
    assert alone > apart_share * positions, alone / positions
    assert compared > 0.98 * positions * len(THRESHOLDS)
