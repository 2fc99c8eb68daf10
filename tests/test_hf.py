"""The transformers backend, end to end, against the naive definition in float64."""

import numpy as np
import pytest
import torch
import transformers as tf

from prift.backends import BadLogits, hf
from prift.heads import body_of, head_of
from prift.models import attention_for, load_config, locate
from prift.stats import CORE, EXTENDED, token_stats
from tests import references
from tests.families import CONFIGS, save, tiny
from tests.scoring import (
    LENGTHS,
    all_positions,
    check_against_truth,
    exactly,
    logits_of,
    scorer_of,
    sequences,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scorer(folder, **options) -> hf.HFScorer:
    config = load_config(locate(str(folder)))
    identity = hf.identify(
        locate(str(folder)), config, dtype="auto", logits_dtype="float32", attention="auto"
    )
    options = {"device": DEVICE, **options}
    return hf.load(locate(str(folder)), config, identity, **options)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_equals_its_full_softmax(family, tmp_path):
    save(family, tmp_path)
    ids = sequences(290)  # Inkling has no logits for the rest
    ids = [s for s in ids if len(s) > 1]
    found = dict(scorer(tmp_path, batch_tokens=128).score(ids, all_positions(ids)))
    assert sorted(found) == list(range(len(ids)))
    exact = tiny(family).double()
    exact.set_attn_implementation("eager")  # whatever prift chose, these are what it must give
    exact.set_experts_implementation("eager")  # the grouped product of experts has no float64
    for i, sequence in enumerate(ids):
        with torch.no_grad():
            logits = exact(torch.tensor(sequence[None].astype(np.int64))).logits[0].double().numpy()
        check_against_truth(found[i], logits[:-1], sequence[1:], atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
def test_error_budget_on_the_same_hidden_states(family):
    """No further from float64 than the obvious float32 code on the same hidden states."""
    model = tiny(family)
    ids = torch.arange(60)[None] * 17 % 301
    with torch.no_grad():
        hidden = body_of(model)(input_ids=ids).last_hidden_state[0, :-1]
        head = head_of(model)
        naive_logits = head.logits(hidden.clone()).numpy()
        exact_head = head_of(model.double())
        exact = hidden.double() @ exact_head.weight.T
        exact = exact + (exact_head.bias if exact_head.bias is not None else 0)
        exact = exact_head.finish(exact).numpy()
    targets = ids[0, 1:]
    stats = token_stats(torch.tensor(naive_logits), targets)
    for i, target in enumerate(targets.tolist()):
        truth = references.token_stats(exact[i], target)
        naive = references.naive_float32(naive_logits[i], target)
        if (np.abs(exact[i] - exact[i, target]) < 1e-4).sum() > 1:
            continue
        for name in ("logprob", "log_mass_rank", "entropy"):
            budget = abs(naive[name] - truth[name]) + 1e-5 * max(1, abs(truth[name]))
            assert abs(float(getattr(stats, name)[i]) - truth[name]) <= budget, name


def test_batch_shape_and_order_do_not_matter(tmp_path):
    save("qwen2", tmp_path)
    ids = [s for s in sequences(301, LENGTHS * 3, seed=1) if len(s) > 1]
    positions = all_positions(ids)
    one = dict(scorer(tmp_path, batch_tokens=1).score(ids, positions))
    many = dict(scorer(tmp_path, batch_tokens=10_000).score(ids, positions))
    turned = dict(scorer(tmp_path, batch_tokens=200).score(ids[::-1], positions[::-1]))
    for i in range(len(ids)):
        for name in ("logprob", "entropy"):
            a, b = getattr(one[i], name), getattr(many[i], name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            c = getattr(turned[len(ids) - 1 - i], name)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_the_same_batches_twice_give_the_same_bits(tmp_path):
    save("mixtral", tmp_path)
    ids = [s for s in sequences(301) if len(s) > 1]
    runs = [dict(scorer(tmp_path).score(ids, all_positions(ids))) for _ in range(2)]
    for i in range(len(ids)):
        for name in CORE:
            assert torch.equal(getattr(runs[0][i], name), getattr(runs[1][i], name))


def test_only_the_positions_asked_for(tmp_path):
    save("llama", tmp_path)
    ids = sequences(301, [30, 20])
    everything = dict(scorer(tmp_path).score(ids, all_positions(ids)))
    some = [np.array([5, 6, 29]), np.array([19])]
    found = dict(scorer(tmp_path).score(ids, some))
    for i in range(2):
        for name in CORE:
            wanted = getattr(everything[i], name)[some[i] - 1]
            torch.testing.assert_close(getattr(found[i], name), wanted, rtol=1e-5, atol=1e-5)


def test_dropout_is_off(tmp_path):
    model = tf.GPT2LMHeadModel(CONFIGS["gpt2"]())
    assert model.config.resid_pdrop == 0.1
    model.train().save_pretrained(tmp_path)
    ids = sequences(301, [30])
    runs = [dict(scorer(tmp_path).score(ids, all_positions(ids)))[0] for _ in range(2)]
    assert torch.equal(runs[0].logprob, runs[1].logprob)


_ATTENDING = ("q_proj", "k_proj", "qkv", "query", "c_attn", "q_b_proj", "in_proj")


def sharpened(family: str, attention: str) -> torch.nn.Module:
    """The family's model with attention that matters: random weights attend to all alike."""
    model = tiny(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and any(part in name for part in _ATTENDING):
                parameter.mul_(20)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_the_attention_chosen_is_the_architectures_own(family):
    """'eager' is the modelling code as written: windows, caps and sinks included."""
    ids = torch.arange(1, 41)[None] * 13 % 301
    with torch.no_grad():
        wanted = sharpened(family, "eager")(input_ids=ids).logits
        found = sharpened(family, attention_for(CONFIGS[family]()))(input_ids=ids).logits
    size = wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * size)


def test_attention_soft_capping_is_honoured():
    """sdpa ignores attn_logit_softcapping: eager is chosen, and asking for sdpa is refused."""
    assert attention_for(CONFIGS["gemma2"]()) == "eager"
    with pytest.raises(Exception, match="soft-caps its attention, which --attention sdpa ignores"):
        attention_for(CONFIGS["gemma2"](), "sdpa")
    ids = torch.arange(1, 41)[None] * 13 % 301
    with torch.no_grad():
        eager, sdpa = (sharpened("gemma2", a)(input_ids=ids).logits for a in ("eager", "sdpa"))
    assert (eager - sdpa).abs().max() > 0.01 * eager.abs().max()


@pytest.mark.parametrize(
    ("family", "attention"),
    [("qwen2", "sdpa"), ("gpt-oss", "eager"), ("mpt", "eager"), ("mamba", "eager")],
)
def test_attention_by_architecture(family, attention):
    """gpt-oss has attention sinks, which sdpa cannot do."""
    assert attention_for(CONFIGS[family]()) == attention


def test_bad_logits_name_the_sequence(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    model.save_pretrained(tmp_path)
    ids = [np.array([1, 2, 3, 4], np.int32), np.array([1, 2, 7, 3], np.int32)]
    with pytest.raises(BadLogits) as error:
        list(scorer(tmp_path).score(ids, all_positions(ids)))
    assert error.value.index == 1  # attention multiplies NaN by zero, so any position of it


def test_bfloat16_logits_are_rounded_only_when_asked(tmp_path):
    save("llama", tmp_path)
    config = load_config(locate(str(tmp_path)))
    ids = sequences(301, [60])
    ties = {}
    for logits_dtype in ("float32", "bfloat16"):
        identity = hf.identify(
            tmp_path, config, dtype="bfloat16", logits_dtype=logits_dtype, attention="auto"
        )
        found = dict(
            hf.load(tmp_path, config, identity, device="cpu").score(ids, [np.arange(1, 60)])
        )
        ties[logits_dtype] = int((found[0].n_tie > 1).sum())
    assert ties["float32"] == 0 and ties["bfloat16"] > 0


@pytest.mark.parametrize("asked", [EXTENDED, ("collision",), ("entropy_top20",), ()])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_extended_statistics_are_those_asked_for(family, asked, tmp_path):
    save(family, tmp_path)
    ids = sequences(301, [30, 20])
    found = dict(scorer(tmp_path).score(ids, all_positions(ids), CORE + asked))
    exact = exactly(tiny(family))
    for i, sequence in enumerate(ids):
        assert found[i].names() == CORE + asked
        logits = logits_of(exact, sequence)[:-1]
        check_against_truth(found[i], logits, sequence[1:], atol=2e-4)
        for t, target in enumerate(sequence[1:]):
            truth = references.token_stats(logits[t], target)
            for name in asked:
                value = float(getattr(found[i], name)[t])
                assert value == pytest.approx(truth[name], rel=2e-4, abs=2e-4), name


def test_a_batch_of_long_and_short_does_not_stretch_the_short():
    """LongRoPE turns all positions of a batch by what its longest sequence asks for."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = CONFIGS["phi3"]()
    config.update({"sliding_window": None, "original_max_position_embeddings": 32})
    config.rope_parameters = rope | {"original_max_position_embeddings": 32}
    torch.manual_seed(0)
    model = tf.Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    ids = sequences(301, [60, 32, 33, 10, 31])
    found = dict(scorer_of(model, batch_tokens=1000).score(ids, all_positions(ids)))
    for i, sequence in enumerate(ids):
        logits = logits_of(model, sequence)[:-1]
        check_against_truth(found[i], logits, sequence[1:], atol=2e-4)
