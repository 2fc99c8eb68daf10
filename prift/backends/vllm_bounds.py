"""What vLLM's public answer to `prompt_logprobs=K` says for certain: the way where its workers
cannot be taught.

For each token it gives logprob, how many tokens have at least its logit, and the K most probable
ones. Where the token is among those or the first behind, rank and ties follow. The mass rank u
follows from the listed tokens twice: as one less the mass above the token, and as the mass of the
token and what is listed below it, to which every token that is neither listed nor as probable as
the token adds at most the least that is listed. Where the two leave u open by more than float32
does anyway (`SLACK`), the token is not known: that is where u is below about 0.3 and the list holds
less than nearly all the mass.

Entropy would need the whole distribution, so these rows are stored without it: rules that read
entropy do not find them, all others do. A sequence with a token that is not known is not stored.
"""

import numpy as np
import torch

from prift.stats import TokenStats

STATISTICS = ("logprob", "log_mass_rank", "rank", "n_tie")
"""The core without entropy."""

SLACK = 2e-5
"""Of log u: how far apart its bounds may lie, which is what float32 log-probabilities leave open
even where all tokens are listed. What is stored is off by half of it at most."""
_ROUNDING = 4e-6  # share by which probabilities from float32 log-probabilities may be off
_TINY = float(np.finfo(np.float32).tiny)


def known_stats(
    logprobs_NK: np.ndarray, reaching_N: np.ndarray, vocabulary: int
) -> tuple[TokenStats, np.ndarray]:
    """(statistics [N], bool [N]: of which tokens they are known).

    logprobs_NK  float32 [N, K+1]: of the token, then of the K most probable, falling
    reaching_N   int [N]: how many tokens have at least the token's logit; vLLM's rank
    vocabulary   V
    """
    listed = logprobs_NK.astype(np.float64)
    own, top, K = listed[:, :1], listed[:, 1:], listed.shape[1] - 1
    is_above = top > own
    above = is_above.sum(1)
    rank, n_tie = 1 + above, reaching_N - above
    # With none listed at or below it, tokens above it may be missing from the list.
    placed = (above < K) | (reaching_N == K + 1) | (K >= vocabulary)
    placed &= n_tie >= 1
    q, q_top = np.exp(own[:, 0]), np.exp(top)
    mass_above = (q_top * is_above).sum(1)
    below = n_tie * q + (q_top * (top < own)).sum(1)
    last = np.minimum(q_top[:, -1], q) if K else q
    room = _ROUNDING * mass_above
    unlisted = np.maximum(vocabulary - np.maximum(K, reaching_N), 0) * last * (1 + _ROUNDING)
    least = np.maximum(below * (1 - _ROUNDING), 1 - mass_above - room)
    most = np.minimum(below * (1 + _ROUNDING) + unlisted, 1 - mass_above + room)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_least, log_most = np.log(least), np.log(np.maximum(most, least))
        near = log_most - log_least <= SLACK
    log_u = np.clip((log_least + log_most) / 2, np.log(np.maximum(q, _TINY)), -_TINY)
    first = placed & (rank == 1)
    log_u[first] = 0.0
    stats = TokenStats(
        logprob=torch.from_numpy(np.minimum(logprobs_NK[:, 0], 0).astype(np.float32)),
        log_mass_rank=torch.from_numpy(log_u.astype(np.float32)),
        rank=torch.from_numpy(rank.astype(np.int32)),
        n_tie=torch.from_numpy(n_tie.astype(np.int32)),
    )
    return stats, placed & (near | first)
