"""Which way a model's hidden rows are made: padded, from shared prompts, or packed.

Padding is always right. The other two are cheaper and depend on what an architecture does with
kept keys or with attention from elsewhere, so each is tried on a few sequences against those
sequences alone, and left where the two differ.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prift.backends.batches import Group
from prift.backends.bodies import padded_rows
from prift.backends.packing import can_pack, packed_rows
from prift.backends.prompts import can_share, grouped, shared_rows
from prift.errors import first_line
from prift.heads import Head, body_of
from prift.memory import is_out_of_memory

Chosen = Sequence[np.ndarray]
_WORST_ROW = 0.3  # relative difference of one row: more than rounding makes of any


class Ways:
    """Makes hidden rows of batches of one model.

    say       told, once, of a way that failed its trial
    may_pack  whether packing may be tried; None: where this device has it
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        say: Callable[[str], None],
        may_pack: bool | None = None,
    ):
        self._model, self._head, self._say = model, head, say
        self._body, self._device = body_of(model), model.get_input_embeddings().weight.device
        self._shares = None if can_share(model) else False
        may_pack = can_pack(model) if may_pack is None else may_pack
        self._packs = None if may_pack else False

    def groups(self, sequences: Chosen, positions: Chosen) -> list[Group]:
        """Sequences that share a prompt together, where that pays and works; the others alone."""
        groups = grouped(sequences, positions)
        first = next((g for g in groups if g.prompt), None)
        if first is not None and self._shares is None:
            self._shares = self._sharing_works(first, sequences, positions)
        if groups and self._packs is None:
            few = range(min(4, len(sequences)))
            self._packs = self._packing_works([sequences[i] for i in few])
        return groups if self._shares else [one for g in groups for one in g.apart()]

    @torch.inference_mode()
    def rows(self, batch: Sequence[Group], sequences: Chosen, positions: Chosen) -> Tensor:
        """Hidden states [N, H] that predict `positions` of the batch's members, joined in order."""
        where = sequences, positions, self._device
        if batch[0].prompt:
            return shared_rows(self._body, self._head, batch, *where)
        if self._packs:
            return packed_rows(self._model, self._body, self._head, *where)
        return padded_rows(self._body, self._head, *where)

    def _sharing_works(self, group: Group, sequences: Chosen, positions: Chosen) -> bool | None:
        """Two sequences of the group, and the same with less of their prompt, so that one prompt
        is padded."""
        pair = Group(group.members[:2], group.lengths[:2], group.prompt)
        less = Group(pair.members, pair.lengths, group.prompt * 3 // 4)
        ids, where = ([of[i] for i in pair.members] for of in (sequences, positions))
        batch = [pair, less], ids * 2, where * 2
        return self._works("prompts are not shared", lambda: self.rows(*batch), ids * 2, where * 2)

    def _packing_works(self, sequences: Chosen) -> bool | None:
        """At all positions: a sequence's first tokens are those that see its neighbour first."""
        positions = [np.arange(1, max(2, len(s))) for s in sequences]
        arguments = self._body, self._head, sequences, positions, self._device
        return self._works(
            "sequences are padded, not packed",
            torch.inference_mode()(lambda: packed_rows(self._model, *arguments)),
            sequences,
            positions,
        )

    def _works(
        self, else_say: str, tried: Callable[[], Tensor], sequences: Chosen, positions: Chosen
    ) -> bool | None:
        """Whether it makes the rows that the sequences have alone, to the rounding of the dtype;
        None where memory did not suffice to tell."""
        try:
            found = tried()
            with torch.inference_mode():
                alone = torch.cat(
                    [
                        padded_rows(self._body, self._head, [s], [p], self._device)
                        for s, p in zip(sequences, positions, strict=True)
                    ]
                )
            # NaN in both is the weights' fault, which scoring reports.
            same = (found == alone) | (found.isnan() & alone.isnan())
            missed_N = (found.double() - alone).masked_fill(same, 0).norm(dim=1)
            size_N = alone.double().nan_to_num().norm(dim=1).clamp_min(1e-30)
            difference = float(missed_N.norm() / size_N.norm())
            reason = f"relative difference {difference:.2g}"
            works = difference <= torch.finfo(self._model.dtype).eps ** 0.5
            works &= bool((missed_N <= _WORST_ROW * size_N).all())
        except Exception as error:  # an architecture's own way of refusing
            if is_out_of_memory(error):
                return None
            reason, works = f"{type(error).__name__}: {first_line(error)}", False
        if not works:
            self._say(f"{else_say}: {type(self._model).__name__} cannot ({reason})")
        return works
