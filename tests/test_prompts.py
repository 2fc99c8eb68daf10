"""Prompts that several sequences share: found, run once, and worth nothing if not exact."""

import functools
import re

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from prift.backends.batches import Group
from prift.backends.prompts import can_share, grouped
from prift.stats import CORE, EXTENDED
from tests.families import CONFIGS, tiny
from tests.scoring import (
    all_positions,
    check_against_truth,
    exactly,
    logits_of,
    scorer_of,
    sequences,
    tokens_run,
)

WINDOWED = {"mistral", "starcoder2", "phi3", "gemma2", "gemma3", "cohere2", "gpt-oss", "inkling"}
STATEFUL = {"mamba", "mamba2", "falcon-h1", "granite-hybrid", "jamba", "recurrent-gemma", "rwkv"}
STATEFUL |= {"qwen3-next"}
FULL = {"llama", "qwen2", "qwen3", "gpt2", "opt", "cohere", "mixtral", "deepseek-v3", "gpt-neox"}
SHARING = [family for family in CONFIGS if can_share(tiny(family))]


def conversations(prompts=(40, 25), answers=((3, 20, 9), (12, 7, 15, 4)), vocabulary=290):
    """Sequences in mixed order, and the positions of their answers."""
    ids, positions = [], []
    for seed, (length, each) in enumerate(zip(prompts, answers, strict=True)):
        prompt, *ends = sequences(vocabulary, [length, *each], seed)
        ids += [np.concatenate([prompt, end]) for end in ends]
        positions += [np.arange(length, length + n) for n in each]
    order = np.random.default_rng(0).permutation(len(ids))
    return [ids[i] for i in order], [positions[i] for i in order]


def shared_and_alone(model, ids, positions, names=CORE) -> tuple[dict, dict]:
    """Scored together with prompts shared, having seen that they were; and each by itself."""
    said = []
    together = scorer_of(model, say=said.append)
    found = {}
    list(together.score(ids, positions, names))  # tries whether sharing works
    count = tokens_run(model, lambda: found.update(together.score(ids, positions, names)))
    groups = grouped(ids, positions)
    assert [g for g in groups if g.prompt] and not any("not shared" in line for line in said), said
    prompts, answers = zip(*((g.prompt, g.longest - g.prompt) for g in groups), strict=True)
    assert count == len(groups) * max(prompts) + len(ids) * max(answers) < sum(map(len, ids))
    one = scorer_of(model, say=lambda line: None)
    alone = {i: dict(one.score([ids[i]], [positions[i]], names))[0] for i in range(len(ids))}
    return found, alone


@st.composite
def tasks(draw):
    """Sequences, some with equal beginnings, and the positions to score."""
    ids, positions = [], []
    for k in range(draw(st.integers(0, 4))):
        length = draw(st.integers(1, 60))
        prompt = np.full(length, draw(st.integers(0, 1)), np.int32)
        for n in draw(st.lists(st.integers(1, 80), min_size=1, max_size=4)):
            ids.append(np.concatenate([prompt, np.arange(n, dtype=np.int32) + 7 * k]))
            scored = draw(st.sets(st.integers(1, len(ids[-1]) - 1), min_size=1)) if n > 1 else {n}
            fixed = draw(st.booleans())
            positions.append(np.array(sorted(scored)) if not fixed else np.array([length]))
    order = draw(st.permutations(range(len(ids))))
    return [ids[i] for i in order], [positions[i] for i in order]


@given(tasks())
def test_groups_hold_every_sequence_once_and_really_share(task):
    ids, positions = task
    groups = grouped(ids, positions)
    assert sorted(i for g in groups for i in g.members) == list(range(len(ids)))
    for group in groups:
        assert group.lengths == [len(ids[i]) for i in group.members]
        assert (len(group.members) > 1) == (group.prompt > 0)
        for i in group.members:
            assert np.array_equal(ids[i][: group.prompt], ids[group.members[0]][: group.prompt])
            # What predicts a scored position is no part of the prompt.
            assert positions[i].min() - 1 >= group.prompt
        if group.prompt:
            assert group.prompt >= 16 and group.tokens <= 0.8 * sum(group.lengths)


def test_a_prompt_is_shared_where_it_saves_a_fifth():
    prompt = np.arange(50, dtype=np.int32)
    first, last = (np.concatenate([prompt, np.full(10, k, np.int32)]) for k in (1, 2))
    scored = [np.array([50, 55]), np.array([50])]
    assert grouped([first, last], scored) == [Group([0, 1], [60, 60], 49)]
    other = np.concatenate([prompt[::-1], first[50:]])
    assert grouped([first, other], scored) == [Group([0], [60]), Group([1], [60])]
    earlier = [np.array([49]), np.array([50])]  # one token less of the prompt is left to one
    assert grouped([first, last], earlier) == [Group([0], [60]), Group([1], [60])]
    # 49 + 2 * (T - 49) <= 0.8 * 2 * T holds up to T = 122
    for length, together in ((122, True), (123, False)):
        longer = [np.concatenate([prompt, np.full(length - 50, k, np.int32)]) for k in (1, 2)]
        assert (len(grouped(longer, scored)) == 1) == together
    for start, together in ((17, True), (16, False)):  # 16 tokens of prompt, and 15
        few = [s[50 - start : 52] for s in (first, last)]
        assert (len(grouped(few, [np.array([start])] * 2)) == 1) == together


def test_one_long_answer_pads_all_the_others():
    """The whole group is then no cheaper than its sequences."""
    prompt = np.arange(30, dtype=np.int32)
    ids = [np.concatenate([prompt, np.full(n, n, np.int32)]) for n in (5, 6, 7, 200)]
    groups = grouped(ids, [np.array([30])] * 4)
    assert [len(g.members) for g in groups] == [1, 1, 1, 1]


def test_who_can_share():
    assert FULL <= set(SHARING)
    assert not (WINDOWED | STATEFUL) & set(SHARING)
    assert (WINDOWED | STATEFUL | FULL) <= set(CONFIGS)


def small(config_class, **options):
    config = CONFIGS["qwen2"]().to_dict()
    kept = {k: v for k, v in config.items() if k.endswith(("_size", "_heads", "layers"))}
    return tf.AutoModelForCausalLM.from_config(config_class(**kept | options))


@pytest.mark.parametrize(
    ("shares", "config_class", "options"),
    [
        (True, tf.Qwen2Config, {"use_sliding_window": False, "sliding_window": 16}),
        (False, tf.Qwen2Config,
         {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        (True, tf.MistralConfig, {"sliding_window": None}),
        (False, tf.MistralConfig, {"sliding_window": 4096}),
        (False, tf.Llama4TextConfig,
         {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 48}),
        (False, tf.GPTNeoConfig,
         {"attention_types": [[["global", "local"], 1]], "window_size": 16, "num_layers": 2,
          "num_heads": 4}),
        (False, tf.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4}),  # no position ids
        (False, tf.LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                                     "rope_theta": 1e4}}),
        (True, tf.LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                    "rope_theta": 1e4}}),
    ],
)  # fmt: skip
def test_what_the_config_says(shares, config_class, options):
    assert can_share(small(config_class, **options)) == shares


@pytest.mark.parametrize("family", SHARING)
def test_shared_prompts_change_no_statistic(family):
    model = tiny(family)
    ids, positions = conversations()
    found, alone = shared_and_alone(model, ids, positions)
    exact = exactly(model)
    for i, sequence in enumerate(ids):
        for name in ("logprob", "entropy"):
            a, b = getattr(found[i], name), getattr(alone[i], name)
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        logits = logits_of(exact, sequence)[positions[i] - 1]
        check_against_truth(found[i], logits, sequence[positions[i]], atol=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_needs_no_places_beyond_those_of_the_model(family):
    """A long prompt and a long answer, of different groups, would reach beyond the 64."""
    ids, positions = conversations((55, 33), ((4, 9, 5, 2), (28, 31, 30, 31)))
    found, alone = shared_and_alone(tiny(family), ids, positions)
    for i in alone:
        torch.testing.assert_close(found[i].logprob, alone[i].logprob, rtol=2e-5, atol=2e-5)


def test_extended_statistics_of_shared_prompts():
    ids, positions = conversations()
    found, alone = shared_and_alone(tiny("llama"), ids, positions, CORE + EXTENDED)
    for i in alone:
        assert found[i].names() == CORE + EXTENDED
        for name in EXTENDED:
            a, b = getattr(found[i], name), getattr(alone[i], name)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scattered_positions_of_unequal_number():
    ids, positions = conversations()
    some = [p[:: 1 + i % 3] for i, p in enumerate(positions)]  # the first stays
    found, _ = shared_and_alone(tiny("qwen3"), ids, some)
    _, alone = shared_and_alone(tiny("qwen3"), ids, positions)
    for i, stats in alone.items():
        wanted = stats.logprob[:: 1 + i % 3]
        torch.testing.assert_close(found[i].logprob, wanted, rtol=2e-5, atol=2e-5)


def test_where_all_positions_are_scored_nothing_is_shared():
    ids, _ = conversations()
    groups = grouped(ids, all_positions(ids))
    assert sorted(groups, key=lambda g: g.members) == [
        Group([i], [len(s)]) for i, s in enumerate(ids)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "deepseek-v3"])
def test_bfloat16_within_its_rounding(family):
    """No further from the truth than unshared bfloat16 is, give or take as much again."""
    ids, positions = conversations()
    model = tiny(family, torch.bfloat16)
    found, alone = shared_and_alone(model, ids, positions)
    exact, errors = exactly(model), {"found": [], "alone": []}
    for i, sequence in enumerate(ids):
        logits = torch.tensor(logits_of(exact, sequence)[positions[i] - 1]).log_softmax(1)
        truth = logits.gather(1, torch.tensor(sequence[positions[i]]).long()[:, None])[:, 0]
        errors["found"].append((found[i].logprob - truth).abs())
        errors["alone"].append((alone[i].logprob - truth).abs())
    ours, theirs = (torch.cat(errors[k]) for k in ("found", "alone"))
    assert 0 < ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def with_faulty_kept_keys(model, fault: str):
    """The same model, whose body does something wrong once it is handed keys from before."""
    forward = model.model.forward

    @functools.wraps(forward)
    def faulty(*args, past_key_values=None, attention_mask=None, **options):
        if past_key_values is None:
            return forward(*args, attention_mask=attention_mask, **options)
        if fault == "raises":
            raise NotImplementedError("no keys from before, please")
        kept = past_key_values if fault == "sees padding" else None
        answer = forward(*args, past_key_values=kept, **options)
        if fault == "nan":
            answer.last_hidden_state = answer.last_hidden_state * torch.nan
        return answer

    model.model.forward = faulty
    return model


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("forgets", r"relative difference \d\.?\d*"),
        ("sees padding", r"relative difference \d\.?\d*"),
        ("nan", "relative difference nan"),
        ("raises", "NotImplementedError: no keys from before, please"),
    ],
)
def test_a_model_that_cannot_is_found_out(fault, reason):
    ids, positions = conversations()
    model, said = with_faulty_kept_keys(tiny("llama"), fault), []
    scorer = scorer_of(model, say=said.append)
    for _ in range(2):  # it is tried once
        found = dict(scorer.score(ids, positions))
    (line,) = [line for line in said if "not shared" in line]
    assert re.fullmatch(rf"prompts are not shared: LlamaForCausalLM cannot \({reason}\)", line)
    exact = exactly(tiny("llama"))
    for i, sequence in enumerate(ids):
        logits = logits_of(exact, sequence)[positions[i] - 1]
        check_against_truth(found[i], logits, sequence[positions[i]], atol=2e-4)
