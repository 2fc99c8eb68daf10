"""vLLM's second model runner, as far as a machine without a GPU can drive it.

It refuses to run without Triton, so no engine here uses it. What is real: the runner's class, its
worker for prompt log-probabilities, that worker's loop over chunks of logits and the way in which
it puts chunked prompts together. What is not: the runner is never started, and the Triton kernel
that finds each position's target is done in torch.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample import prompt_logprob

from prift.backends import vllm_worker
from prift.stats import CORE, EXTENDED
from tests import references
from tests.vllm.brackets import brackets, check

V, H = 5000, 64
CPU = torch.device("cpu")


class Worker(vllm_worker.WorkerExtension):
    """A worker with a runner of the second kind."""

    def __init__(self):
        runner = self.model_runner = object.__new__(GPUModelRunner)
        runner.device = CPU
        runner.prompt_logprobs_worker = prompt_logprob.PromptLogprobsWorker(8, CPU)


@pytest.fixture
def worker():
    """With the statistics installed; afterwards all is as it was."""
    worker, own = Worker(), prompt_logprob.compute_topk_scores
    done, said = worker.prift_install(False, False)
    assert done and "V2" in said
    yield worker
    worker.prift_remove()
    assert prompt_logprob.compute_topk_scores is own


def drawn(rows: int, seed: int = 0):
    """(hidden [rows, H], the head as a function, targets [rows]), half of the targets likely."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 0.3
    targets = torch.randint(0, V, (rows,), generator=generator)
    logits = hidden @ weight.T
    targets[::2] = torch.multinomial(logits[::2].softmax(1), 1, generator=generator)[:, 0]
    return hidden, lambda h: h @ weight.T, targets


def columns(answer, names) -> dict[str, np.ndarray]:
    """Statistics from what the runner's functions answer with."""
    _, values, ranks = answer
    stats = vllm_worker.unpack(values.numpy(), ranks.numpy(), names)
    return {name: getattr(stats, name).double().numpy() for name in names}


@pytest.mark.parametrize("names", [CORE, CORE + EXTENDED], ids=["core", "extended"])
def test_statistics_through_the_runners_own_loop_over_chunks(worker, names):
    hidden, head, targets = drawn(2500)  # chunks of 1024 rows
    K = vllm_worker.columns_for(names)
    answer = prompt_logprob.compute_prompt_logprobs_with_chunking(targets, hidden, head, K)
    found = columns(answer, names)
    logits = head(hidden)
    check({n: found[n] for n in CORE}, brackets(logits, targets))
    for i in range(0, 2500, 97):
        truth = references.token_stats(logits[i].numpy(), int(targets[i]))
        for name in names:
            assert found[name][i] == pytest.approx(truth[name], rel=2e-5, abs=2e-5), name
    assert (answer[0][:, 0] == targets).all()


def test_bfloat16_logits_count_their_ties(worker):
    hidden, head, targets = drawn(40)
    K = vllm_worker.columns_for(CORE)
    answer = prompt_logprob.compute_prompt_logprobs_with_chunking(
        targets, hidden, lambda h: head(h).bfloat16(), K
    )
    found, logits = columns(answer, CORE), head(hidden).bfloat16().float()
    truth = [
        references.token_stats(z.numpy(), int(y)) for z, y in zip(logits, targets, strict=True)
    ]
    assert max(t["n_tie"] for t in truth) > 1
    for name in ("rank", "n_tie"):
        assert found[name].tolist() == [t[name] for t in truth]


def torch_targets(num_tokens, query_start_loc, idx_mapping, num_computed_tokens, all_token_ids):
    """What the Triton kernel of this name does: the token that follows each scheduled one."""
    found = torch.empty(num_tokens, dtype=torch.int64)
    for i, request in enumerate(idx_mapping.tolist()):
        begin, end = query_start_loc[i], query_start_loc[i + 1]
        first = num_computed_tokens[request] + 1
        found[begin:end] = all_token_ids[request, first : first + end - begin]
    return found


def test_a_chunked_prompt_beside_a_whole_one(worker, monkeypatch):
    """Prompts of 7 and 12 tokens: the second comes in steps of 5, 5 and 2."""
    monkeypatch.setattr(prompt_logprob, "get_prompt_logprobs_token_ids", torch_targets)
    steps, K = worker.model_runner.prompt_logprobs_worker, vllm_worker.columns_for(CORE)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=K, flat_logprobs=True)
    lengths = np.array([7, 12])
    ids = torch.zeros(2, 16, dtype=torch.int64)
    hidden, head, tokens = drawn(19)
    hidden = hidden.split([7, 12])
    for i, (name, own) in enumerate(zip("ab", tokens.split([7, 12]), strict=True)):
        ids[i, : len(own)] = own
        steps.add_request(name, i, asked)
    answers, computed = {}, np.zeros(2, np.int64)
    for scheduled in ([7, 5], [0, 5], [0, 2]):
        here = [i for i in (0, 1) if scheduled[i]]
        counts = np.array([scheduled[i] for i in here])
        start = np.concatenate([[0], np.cumsum(counts)])
        batch = SimpleNamespace(
            req_ids=["ab"[i] for i in here],
            idx_mapping=torch.tensor(here),
            idx_mapping_np=np.array(here),
            num_tokens=int(counts.sum()),
            num_scheduled_tokens=counts,
            query_start_loc=torch.tensor(start),
            query_start_loc_np=start,
            num_computed_prefill_tokens_np=computed[here],
            prefill_len_np=lengths[here],
        )
        rows = torch.cat([hidden[i][computed[i] : computed[i] + scheduled[i]] for i in here])
        answers |= steps.compute_prompt_logprobs(
            head, rows, batch, ids, torch.tensor(computed), lengths
        )
        computed = computed + scheduled
    assert sorted(answers) == ["a", "b"]
    for i, name in enumerate("ab"):
        logits, targets = head(hidden[i][:-1]), ids[i, 1 : lengths[i]]
        found = answers[name]
        given = (found.logprob_token_ids, found.logprobs, found.selected_token_ranks)
        check(columns(given, CORE), brackets(logits, targets), name)


def test_any_other_K_is_vllms_own(monkeypatch):
    asked = []
    own = prompt_logprob.compute_topk_scores

    def recorded(logits, K, targets, **more):
        asked.append((K, more))
        return "its own answer"

    monkeypatch.setattr(prompt_logprob, "compute_topk_scores", recorded)
    worker = Worker()
    assert worker.prift_install(False, False)[0]
    hidden, head, targets = drawn(3)
    answer = prompt_logprob.compute_topk_scores(head(hidden), 20, targets, logits_mode=False)
    assert answer == "its own answer" and asked == [(20, {"logits_mode": False})]
    worker.prift_remove()
    assert prompt_logprob.compute_topk_scores is recorded is not own


def test_a_runner_without_the_function_is_told(monkeypatch):
    monkeypatch.delattr(prompt_logprob, "compute_topk_scores")
    done, why = Worker().prift_install(False, False)
    assert not done and "no function that prift knows" in why
