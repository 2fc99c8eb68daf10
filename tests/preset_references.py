"""The loss of one optimiser step as other programs reduce it, from full logits, with autograd.

    loss_<preset>(step, model, prior) -> scalar whose gradient the optimiser sees
    logged(preset, loss, step) -> what that program logs of it

step: micro-batches, each a list of rows (input_ids, labels with -100 where nothing is trained).
model, prior: row -> logits [T, V] of the same dtype, the prior's without gradient. Written from
what each program does, after its version in prift.presets, not from prift's code.
"""

import torch


def _tokens(rows, logits_of):
    """(logits of the position in front [V], token) of each label token."""
    for ids, labels in rows:
        logits = logits_of(ids)
        for t in range(1, len(ids)):
            if labels[t] != -100:
                yield logits[t - 1], ids[t]


def _count(rows) -> int:
    return sum(label != -100 for _, labels in rows for label in labels[1:])


def _prift(step, model, prior, weight):
    """Each micro-batch: the sum over its tokens by their number, of which the gradients add up."""
    total = 0.0
    for rows in step:
        pairs = zip(_tokens(rows, model), _tokens(rows, prior), strict=True)
        losses = [-z.log_softmax(0)[y] * weight(q.softmax(0), y) for (z, y), (q, _) in pairs]
        total = total + sum(losses) / _count(rows)
    return total


def logged(name, loss, step):
    """PriFT's code divides by the micro-batches once it has the gradients."""
    return loss / len(step) if name.startswith("prift-code") else loss


def loss_prift_code_prob(step, model, prior):
    return _prift(step, model, prior, lambda q, y: float(q[y]))


def loss_prift_code_mass(step, model, prior):
    """The mass strictly below the target, and its own once."""
    return _prift(step, model, prior, lambda q, y: float(q[q < q[y]].sum() + q[y] >= 0.5))


def _by_all_items(step, model, weight):
    """transformers' num_items_in_batch: the label tokens of all micro-batches of the step."""
    items = sum(map(_count, step))
    total = 0.0
    for rows in step:
        for z, y in _tokens(rows, model):
            nll = torch.nn.functional.cross_entropy(z[None], torch.tensor([y]))
            with torch.no_grad():
                factor = weight(z.detach(), nll.detach())
            total = total + nll * factor / items
    return total


def _dft(step, model, prior):
    return _by_all_items(step, model, lambda z, nll: torch.exp(-nll))


loss_trl_dft = loss_llamafactory_dft = loss_ms_swift_dft = _dft


def _top_entropy(z):
    """Of the 20 largest logits, renormalised; nats."""
    logs = z.topk(min(20, len(z))).values.log_softmax(0)
    return -(logs.exp() * logs).sum()


def loss_llamafactory_eaft(step, model, prior):
    return _by_all_items(step, model, lambda z, nll: _top_entropy(z) / 3.0)


def loss_axolotl_eaft(step, model, prior):
    return _by_all_items(step, model, lambda z, nll: _top_entropy(z))
