"""Sequences that begin with the same prompt pay for it once.

Several answers to one question, say: the prompt goes through the body once and leaves its keys and
values, which the answers then attend to. Only for models whose every layer attends to everything
before it; elsewhere keys are forgotten (windows) or summed up (state spaces). What is predicted
from the prompt's last token belongs to the answers, so a prompt here ends one token earlier.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prift.backends.batches import Group
from prift.backends.bodies import pad, pick, tensor
from prift.heads import Head, accepted, body_of
from prift.models import turns_by_length
from prift.packing import layer_kinds

_LEAST_SAVED = 0.2  # of a group's tokens: below, attention to kept keys eats what is saved
_LEAST_PROMPT = 16  # tokens
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # window_size: GPT-Neo


def can_share(model: nn.Module) -> bool:
    """Whether every layer of the model keeps the keys and values of all tokens, a key does not
    depend on how long the sequence becomes, and padding behind a prompt shifts nobody's place."""
    config = model.config.get_text_config()
    windowed = any(getattr(config, n, None) for n in _WINDOWS)
    windowed = windowed and getattr(config, "use_sliding_window", True)
    stateful = getattr(model, "_is_stateful", False)
    placed = accepted(body_of(model), {"position_ids": None})
    return bool(
        layer_kinds(config) == {"full_attention"}
        and placed
        and not (windowed or stateful or turns_by_length(config))
    )


def grouped(sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> list[Group]:
    """All sequences, in groups where sharing the prompt is worth it and each alone elsewhere."""
    by_prompt = defaultdict(list)
    for i, scored in enumerate(positions):
        prompt = int(scored[0]) - 1
        alike = sequences[i][:prompt].tobytes() if prompt >= _LEAST_PROMPT else i
        by_prompt[alike].append(i)
    groups = []
    for members in by_prompt.values():
        prompt = int(positions[members[0]][0]) - 1
        group = Group(members, [len(sequences[i]) for i in members], prompt)
        worth = len(members) > 1 and group.tokens <= (1 - _LEAST_SAVED) * sum(group.lengths)
        groups += [group] if worth else group.apart()
    return groups


def shared_rows(
    body: nn.Module,
    head: Head,
    groups: Sequence[Group],
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    device: torch.device,
) -> Tensor:
    """Hidden states [N, H] that predict `positions` of the groups' members, joined in order.

    sequences, positions  of the members, group after group
    """
    owner = np.repeat(np.arange(len(groups)), [len(g.members) for g in groups])
    prompts = np.array([g.prompt for g in groups])
    firsts = np.cumsum([0] + [len(g.members) for g in groups[:-1]])
    prompt_GP = pad([sequences[i][:n] for i, n in zip(firsts, prompts, strict=True)])
    begins = prompts[owner]
    answer_BA = pad([s[n:] for s, n in zip(sequences, begins, strict=True)])

    P, A = prompt_GP.shape[1], answer_BA.shape[1]
    # No mask: a prompt's tokens never see the padding behind it.
    kept = body(input_ids=tensor(prompt_GP, device), use_cache=True).past_key_values
    kept.batch_select_indices(torch.from_numpy(owner))  # its layers may lie on several devices
    # Padding's own places may lie beyond what the model has a position for.
    place_BA = np.minimum(begins[:, None] + np.arange(A), max(map(len, sequences)) - 1)
    seen_BT = np.concatenate([np.arange(P) < begins[:, None], np.ones((len(owner), A), bool)], 1)
    hidden_BAH = body(
        input_ids=tensor(answer_BA, device),
        position_ids=tensor(place_BA, device),
        attention_mask=tensor(seen_BT, device),
        past_key_values=kept,
        use_cache=True,
    ).last_hidden_state.to(head.weight)
    return pick(hidden_BAH, [p - n for p, n in zip(positions, begins, strict=True)])
