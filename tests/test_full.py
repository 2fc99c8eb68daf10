"""Models whose head prift does not know are scored from their own logits."""

import numpy as np
import pytest
import torch
import transformers as tf

from prift.backends.full import full_stats, most_tokens
from prift.errors import ModelError
from prift.stats import CORE, EXTENDED, tile_sums
from tests.families import CONFIGS
from tests.scoring import (
    all_positions,
    assert_equal_stats,
    check_against_truth,
    logits_of,
    scorer_of,
    sequences,
    tokens_run,
)


class Tempered(tf.LlamaForCausalLM):
    """Divides its logits by a temperature that it has learnt."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.tensor(1.7))

    def forward(self, input_ids=None, position_ids=None, use_cache=None, **options):
        answer = super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)
        answer.logits = answer.logits / self.temperature
        return answer


class Whole(tf.PreTrainedModel):
    """Has no body of its own: all that it is is one module."""

    config_class = tf.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = tf.LlamaForCausalLM(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, input_ids=None, position_ids=None):
        return self.inner(input_ids, position_ids=position_ids)


REASONS = {
    Tempered: "prift does not understand how Tempered makes its logits",
    Whole: "Whole does not separate its body from its output projection",
}


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = kind(CONFIGS["llama"]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model.to(dtype).eval()


@pytest.mark.parametrize("kind", REASONS)
def test_scored_from_its_own_logits(kind):
    said, model = [], make(kind)
    assert kind is not Whole or model.base_model is model
    ids = sequences(301, [2, 3, 17, 40, 40, 63, 5])
    scorer = scorer_of(model, batch_tokens=128, say=said.append)
    for _ in range(2):
        found = dict(scorer.score(ids, all_positions(ids)))
    (line,) = [line for line in said if "full logits" in line]
    assert line.startswith(REASONS[kind])
    assert line.endswith("Scoring from the model's full logits, which is slower.")
    assert sorted(found) == list(range(len(ids)))
    exact = make(kind).double()
    for i, sequence in enumerate(ids):
        check_against_truth(found[i], logits_of(exact, sequence)[:-1], sequence[1:], atol=2e-4)


def test_the_temperature_counts():
    """What the head alone would give is far from the model's own."""
    ids = sequences(301, [40])
    found = dict(scorer_of(make(Tempered), say=print).score(ids, all_positions(ids)))
    cold = dict(scorer_of(make(tf.LlamaForCausalLM)).score(ids, all_positions(ids)))
    assert (found[0].logprob - cold[0].logprob).abs().max() > 0.1


def test_positions_and_statistics_asked_for():
    ids = sequences(301, [30, 20])
    scorer = scorer_of(make(Tempered), say=lambda line: None)
    everything = dict(scorer.score(ids, all_positions(ids), CORE + EXTENDED))
    some = [np.array([5, 6, 29]), np.array([19])]
    found = dict(scorer.score(ids, some, CORE + ("collision",)))
    for i in range(2):
        assert everything[i].names() == CORE + EXTENDED
        assert found[i].names() == CORE + ("collision",)
        for name in found[i].names():
            wanted = getattr(everything[i], name)[some[i] - 1]
            torch.testing.assert_close(getattr(found[i], name), wanted, rtol=1e-5, atol=1e-5)


def test_no_prompt_is_shared():
    prompt, *answers = sequences(301, [40, 5, 6, 7])
    ids = [np.concatenate([prompt, answer]) for answer in answers]
    positions = [np.arange(40, len(s)) for s in ids]
    model = make(Tempered)
    scorer, found = scorer_of(model, say=lambda line: None), {}
    count = tokens_run(model, lambda: found.update(scorer.score(ids, positions)))
    assert count == 3 * 47
    everything = dict(scorer.score(ids, all_positions(ids)))
    assert_equal_stats(found, {i: s.map(lambda x: x[39:]) for i, s in everything.items()})


def test_half_precision_logits_are_refused_for_float32():
    with pytest.raises(ModelError, match="Its own logits are rounded to bfloat16") as error:
        scorer_of(make(Tempered, torch.bfloat16))
    assert "Use --dtype float32 for exact ones, or --logits-dtype bfloat16." in str(error.value)
    assert str(error.value).startswith(REASONS[Tempered])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_logits(dtype):
    """Those of the model, rounded once where it is a float32 model."""
    model = make(Tempered, dtype)
    ids = sequences(301, [60])
    scorer = scorer_of(model, logits_dtype="bfloat16", say=lambda line: None)
    found = dict(scorer.score(ids, all_positions(ids)))[0]
    rounded = torch.tensor(logits_of(model, ids[0])[:-1]).bfloat16().double().numpy()
    check_against_truth(found, rounded, ids[0][1:], atol=2e-4)
    assert (found.n_tie > 1).any()


def test_the_logits_of_a_batch_keep_to_their_bound():
    cpu = torch.device("cpu")
    for vocabulary in (301, 50_257, 151_936):
        assert most_tokens(cpu, vocabulary) * vocabulary * 4 <= 256 << 20
        assert (most_tokens(cpu, vocabulary) + 1) * vocabulary * 4 > 256 << 20
    assert most_tokens(cpu, 10**10) == 1


def test_the_budget_is_lowered_for_it():
    """A vocabulary of a million: 64 tokens at once, where four thousand were asked for."""
    config = CONFIGS["llama"]()
    config.update({"vocab_size": 1_000_000, "hidden_size": 8, "num_attention_heads": 2})
    config.update({"head_dim": 4, "num_hidden_layers": 1})
    assert most_tokens(torch.device("cpu"), 1_000_000) == 67
    ids, sizes = sequences(301, [20] * 7), []
    model = Tempered(config).eval()
    scorer = scorer_of(model, batch_tokens=4096, say=lambda line: None)
    hook = model.register_forward_hook(lambda m, given, answer: sizes.append(answer.logits.shape))
    found = dict(scorer.score(ids, [np.array([19])] * 7))
    hook.remove()
    assert sorted(found) == list(range(7))
    assert [tuple(s) for s in sizes] == [(3, 20, 1_000_000)] * 2 + [(1, 20, 1_000_000)]


def test_a_smaller_budget_stays():
    model = make(Tempered)
    scorer, ids = scorer_of(model, batch_tokens=40, say=lambda line: None), sequences(301, [20] * 4)
    shapes = []
    hook = model.register_forward_hook(lambda m, given, answer: shapes.append(answer.logits.shape))
    list(scorer.score(ids, all_positions(ids)))
    hook.remove()
    assert [s[0] for s in shapes] == [2, 2]


def test_rows_of_all_sequences_in_order():
    model, ids = make(Tempered), sequences(301, [10, 30, 4])
    positions = [np.array([9]), np.array([1, 29]), np.array([2, 3])]
    with torch.no_grad():
        found = full_stats(
            model, ids, positions, logits_dtype="float32", names=CORE, sums=tile_sums
        )
    logits = [logits_of(model, s)[p - 1] for s, p in zip(ids, positions, strict=True)]
    targets = [s[p] for s, p in zip(ids, positions, strict=True)]
    check_against_truth(found, np.concatenate(logits), np.concatenate(targets), atol=2e-4)
