"""The worker extension on a vLLM whose insides have moved: what is exchanged is not what matters.

Real engines load these classes by name; the self-test has to find out.
"""

import os
from typing import Any

import torch

from prift.backends import vllm_worker

MOVES = {
    "nothing is called": lambda columns, logits, targets, K: None,
    "targets are those of the next position": lambda columns, logits, targets, K: columns(
        logits, targets.roll(1), K
    ),
    "logits are halved": lambda columns, logits, targets, K: columns(logits / 2, targets, K),
    "logits are log-probabilities of a part": lambda columns, logits, targets, K: columns(
        logits.masked_fill(torch.arange(logits.shape[1]) % 2 == 0, -torch.inf).scatter(
            1, targets[:, None].long(), logits.gather(1, targets[:, None].long())
        ),
        targets,
        K,
    ),
    "rows are those of another prompt": lambda columns, logits, targets, K: columns(
        logits.flip(0), targets, K
    ),
    "logits are rounded": lambda columns, logits, targets, K: columns(
        logits.bfloat16(), targets, K
    ),
}
"""What the exchanged function is handed: (own function, logits, targets, K) -> its answer; None:
vLLM's own is called."""
MOVED = "PRIFT_TEST_MOVED"
"""Environment variable with one of MOVES, where none is chosen."""


class Moved(vllm_worker.WorkerExtension):
    """Installs the statistics behind one of MOVES, chosen by `prift_move`."""

    def prift_move(self, name: str | None) -> None:
        self.prift_name = name

    def prift_install(self, rounded: bool, compiled: bool | None) -> tuple[bool, str]:
        done = super().prift_install(rounded, compiled)
        name = getattr(self, "prift_name", os.environ.get(MOVED))
        if name is None:
            return done
        sampler, move = self.model_runner.sampler, MOVES[name]
        gather, put_back = sampler.gather_logprobs, self._prift_put_back
        own = type(sampler).gather_logprobs

        def moved(logits: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
            if not vllm_worker.is_ours(num_logprobs):
                return gather(logits, num_logprobs, token_ids)
            answer = move(lambda z, y, K: gather(z, K, y), logits, token_ids, num_logprobs)
            return own(logits.log_softmax(1), num_logprobs, token_ids) if answer is None else answer

        sampler.gather_logprobs = moved
        self._prift_put_back = put_back
        return done
