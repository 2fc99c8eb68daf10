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
from prift.packcheck import difference, packing_misfit

Chosen = Sequence[np.ndarray]


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
            return packed_rows(self._model, self._head, *where)
        return padded_rows(self._body, self._head, *where)

    def _sharing_works(self, group: Group, sequences: Chosen, positions: Chosen) -> bool | None:
        """Two sequences of the group, and the same with less of their prompt, so that one prompt
        is padded."""
        pair = Group(group.members[:2], group.lengths[:2], group.prompt)
        less = Group(pair.members, pair.lengths, group.prompt * 3 // 4)
        ids, where = ([of[i] for i in pair.members] for of in (sequences, positions))
        tried = [pair, less], ids * 2, where * 2
        return self._works("prompts are not shared", lambda: self._sharing_misfit(*tried))

    def _packing_works(self, sequences: Chosen) -> bool | None:
        return self._works(
            "sequences are padded, not packed",
            lambda: packing_misfit(self._model, self._head, sequences),
        )

    def _sharing_misfit(
        self, batch: list[Group], sequences: Chosen, positions: Chosen
    ) -> str | None:
        """Why these rows are not those that the sequences have alone, or None."""
        found = self.rows(batch, sequences, positions)
        each = zip(sequences, positions, strict=True)
        with torch.inference_mode():
            alone = [padded_rows(self._body, self._head, [s], [p], self._device) for s, p in each]
            return difference(found, torch.cat(alone), self._model.dtype)

    def _works(self, else_say: str, misfit: Callable[[], str | None]) -> bool | None:
        """Whether there is no misfit; None where memory did not suffice to tell."""
        try:
            reason = misfit()
        except Exception as error:  # an architecture's own way of refusing
            if is_out_of_memory(error):
                return None
            reason = f"{type(error).__name__}: {first_line(error)}"
        if reason is not None:
            self._say(f"{else_say}: {type(self._model).__name__} cannot ({reason})")
        return reason is None
