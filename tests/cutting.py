"""Training on cut batches, and the same training by the naive definition from full logits.

As a module it is one rank of a distributed run:
python -m tests.cutting FOLDER METHOD ACCUMULATION [packed] [anchored] [NORMALIZER]
"""

import itertools
import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from prift.arguments import training_arguments
from prift.dataset import PriorDataset, collate
from prift.forward import install
from prift.heads import body_of
from prift.methods import METHODS, weigher
from prift.normalizers import DENOMINATORS
from prift.packing import varlen_attention
from prift.ranks import is_rank_zero, leave
from prift.text.examples import Examples
from prift.trainer import PriftTrainer
from prift.watch import StepGuard
from prift.weigher import Weigher
from prift.weighing import weigh, weigh_without_statistics
from tests import references, rule_references
from tests.families import tiny
from tests.grids import grid, labels_of
from tests.test_request import examples
from tests.varlen import on_the_cpu

# Per example: "." = prompt, 1 = label token of a weight, 0 = label token of weight zero.
KEPT = [
    "...1111", "..110000000", ".0000", "....010100",
    ".00000", "..0000000", "...111000111", ".1",
    "..0001", ".10000000000", "...1", "..000000",
]  # fmt: skip
BATCH, STEPS, RATE = 2, 3, 0.05
ANCHOR = 0.02  # its weight, where there is one
CASES = {name: (*pair, {}) for name, pair in METHODS.items()}
CASES["online-rank"] = ("rank", "online", {"most": "50"})  # a step of one batch has no such token
NOTHING_TO_RUN = 2  # the number of the batch that holds examples 4 and 5


def dataset(chosen: Weigher, normalize: str = "tokens", anchored: bool = False) -> PriorDataset:
    """Examples of random ids, and statistics that give the weights of KEPT."""
    random = np.random.RandomState(0)
    rows = [(random.randint(3, 300, len(k)), k.replace("0", "1").replace(".", "0")) for k in KEPT]
    kept = np.array([c == "1" for k in KEPT for c in k if c != "."])
    mass = np.where(kept, -0.1, -3.0).astype(np.float32)
    logprob = -random.uniform(0.1, 4, len(kept))
    if chosen.name == "prob":
        logprob[~kept] = -200.0  # a probability that float32 rounds to zero
    ones = np.ones(len(kept), np.int32)
    prior = {"logprob": logprob.astype(np.float32), "log_mass_rank": mass, "n_tie": ones}
    return weighed(examples(*rows), prior, chosen, normalize, anchored)


def weighed(
    rows: Examples,
    prior: dict[str, np.ndarray],
    chosen: Weigher,
    normalize: str = "tokens",
    anchored: bool = False,
) -> PriorDataset:
    """With the weights of a rule whose source is the prior, and cut by them unless anchored; with
    those of one that reads nothing."""
    if chosen.source != "prior":
        weights = weigh_without_statistics(chosen, rows) if chosen.known else None
        return PriorDataset(rows, prior, normalize=normalize, weights=weights)
    weights = weigh(chosen, rows.label_counts, prior)
    return PriorDataset(rows, prior | {"weights": weights}, not anchored, normalize)


def run(
    folder: Path,
    method: str,
    accumulation: int,
    flags: str = "",
    packed: bool = False,
    normalize: str = "tokens",
    anchored: bool = False,
) -> dict:
    """Trains with prift: what was logged, the shapes the body saw, the parameters."""
    chosen = weigher(*CASES[method])
    model, shapes = tiny("llama"), []
    install(model, chosen)
    body_of(model).register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    words = (
        f"--report_to none --logging_steps 1 --save_strategy no --lr_scheduler_type constant "
        f"--optim sgd --learning_rate {RATE} --max_grad_norm 0 --train_sampling_strategy "
        f"sequential --max_steps {STEPS} --per_device_train_batch_size {BATCH} "
        f"--gradient_accumulation_steps {accumulation} {flags}"
    )
    trainer = PriftTrainer(
        model=model,
        args=training_arguments(str(folder / "out"), {}, words.split(), False)[0],
        data_collator=partial(collate, packed=packed),
        train_dataset=dataset(chosen, normalize, anchored),
        guard=StepGuard(chosen, anchored=anchored),
        full_metrics_steps=100,  # that is, in the first step
        skips_rows=chosen.source == "prior" and not anchored,
        anchor=ANCHOR if anchored else None,
    )
    with ExitStack() as stack:
        if packed:
            stack.enter_context(on_the_cpu())
            stack.enter_context(varlen_attention(model))
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "mean_weight" in entry]
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    return {"logged": logged, "shapes": shapes, "parameters": parameters}


def naive(
    method: str,
    batches_a_step: int,
    ranks: int = 1,
    dtype=torch.float64,
    normalize: str = "tokens",
    anchored: bool = False,
) -> dict:
    """The same by the definitions: whole sequences, full logits, plain autograd, in `dtype`."""
    chosen = weigher(*CASES[method])
    data, model, logged = dataset(chosen), tiny("llama").to(dtype), []
    starts = iter(range(0, len(data), BATCH))
    for step in range(STEPS):
        batches = [
            collate([data.whole(i) for i in range(start, start + BATCH)])
            for start in itertools.islice(starts, batches_a_step)
        ]
        if not batches:
            break
        denominator, pull = 0.0, torch.zeros((), dtype=dtype)
        loss, table = torch.zeros((), dtype=dtype), []
        for number, batch in enumerate(batches):
            logits = model(input_ids=batch["input_ids"]).logits
            weights = naive_weights(method, batch, logits.detach())
            labelled = labels_of(batch) != -100
            scaled = weights
            if normalize == "sequence":
                scaled = weights / labelled.sum(1, keepdim=True).clamp_min(1)
            own = batch["num_labels"] if normalize.startswith("micro-batch") else 1.0
            loss = loss + references.weighted_loss(logits, labels_of(batch), scaled, own)
            denominator += {
                "micro-batch": 1,
                "micro-batch-sum": ranks / len(batches),  # whose gradients are averaged alone
                "tokens": batch["num_labels"],
                "kept": int((weights[labelled] != 0).sum()),
                "weights": float(weights[labelled].sum()),
                "sequence": int(labelled.any(1).sum()),
            }[normalize]
            if anchored:
                logprob = grid(batch, batch["prior"]["logprob"])
                pull = pull + ANCHOR * references.anchor(logits, labels_of(batch), logprob)
            measured = chosen.source != "prior" or anchored or (step == 0 and number < ranks)
            table += per_token(batch, logits.detach(), weights, measured)
        loss = loss / (denominator or 1.0) + pull / len(table)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
        means = len(batches) / ranks if normalize == "micro-batch-sum" else 1
        values = {"loss": float(loss.detach()) / means, "grad_norm": float(norm)}
        logged.append(values | metrics(np.array(table), anchored))
    return {
        "logged": logged,
        "parameters": {name: p.detach().double() for name, p in model.named_parameters()},
    }


def naive_weights(method: str, batch: dict, logits: torch.Tensor) -> torch.Tensor:
    labels = labels_of(batch)
    prior = {name: grid(batch, values) for name, values in batch["prior"].items()}
    weights = torch.zeros(labels.shape, dtype=logits.dtype)
    for b, t in (labels != -100).nonzero().tolist():
        weights[b, t] = {
            "sft": lambda b=b, t=t: 1.0,
            "dft": lambda b=b, t=t: rule_references.weight_prob(
                rule_references.softmax(logits[b, t - 1].numpy()), int(labels[b, t])
            ),
            "online-rank": lambda b=b, t=t: rule_references.weight_rank(
                rule_references.softmax(logits[b, t - 1].numpy()), int(labels[b, t]), most=50
            ),
            "prift-prob": lambda b=b, t=t: float(prior["logprob"][b, t].exp()),
            "prift-mass": lambda b=b, t=t: float(prior["log_mass_rank"][b, t] > -0.5),
        }[method]()
    return weights


def per_token(batch: dict, logits: torch.Tensor, weights: torch.Tensor, measured: bool) -> list:
    """(weight, nll, log p - log q, whether nll and drift are measured on it) of each label."""
    rows, labels, logprob = [], labels_of(batch), grid(batch, batch["prior"]["logprob"])
    for b, t in (labels != -100).nonzero().tolist():
        nll = -float(torch.log_softmax(logits[b, t - 1], 0)[labels[b, t]])
        rows.append((float(weights[b, t]), nll, -nll - float(logprob[b, t]), measured))
    return rows


def metrics(table: np.ndarray, anchored: bool) -> dict[str, float]:
    weight, nll, drift, measured = table.T
    found = {"mean_weight": weight.mean(), "zero_share": (weight == 0).mean()}
    if anchored:
        found["anchor"] = np.mean([references.k3(0.0, float(one)) for one in drift])
    for suffix, over in (("_kept", weight != 0), ("", measured == 1)):
        if over.any():
            found |= {f"nll{suffix}": nll[over].mean(), f"drift{suffix}": drift[over].mean()}
    return found


if __name__ == "__main__":
    target, method_name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    normalizer = next((n for n in DENOMINATORS if n in sys.argv), "tokens")
    words = {word: word in sys.argv for word in ("packed", "anchored")}
    result = run(target, method_name, steps, normalize=normalizer, **words)
    rank = torch.distributed.get_rank()
    (target / f"shapes{rank}.json").write_text(json.dumps(result["shapes"]))
    if is_rank_zero():
        torch.save(result["parameters"], target / "parameters.pt")
        (target / "logged.json").write_text(json.dumps(result["logged"]))
    leave()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads
