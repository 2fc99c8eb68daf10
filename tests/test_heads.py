"""Heads against the model's own logits, family by family."""

from dataclasses import replace

import pytest
import torch
import transformers as tf

from prift.errors import ModelError
from prift.headcheck import check_causal, check_head, head_or_reason, misfit
from prift.heads import Head, body_of, head_of, run_body
from prift.products import add_pull_back, add_turned, project
from tests.families import CONFIGS, tiny

SCALED = {  # family -> factor on its logits, where there is one
    "cohere": 0.25,
    "cohere2": 0.25,
    "granite": 1 / 4,
    "granite-hybrid": 1 / 4,
    "minicpm3": 10 / 32,
    "inkling": 1 / 3,
    "hyperclovax": 4.0,
    "falcon-h1": 0.3,
}
CAPPED = {"gemma2", "gemma3", "recurrent-gemma"}
TIED = {"llama-tied", "gpt2", "gemma2", "cohere", "falcon", "mpt", "mamba", "recurrent-gemma"}


@pytest.mark.parametrize("family", CONFIGS)
def test_head_equals_the_models_own_logits(family):
    model = tiny(family)
    ids = torch.arange(1, 41)[None] * 13 % 301
    with torch.no_grad():
        own = model(input_ids=ids).logits[0]
        hidden = run_body(body_of(model), ids, head_of(model))[0]
    torch.testing.assert_close(head_of(model).logits(hidden), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_head_is_understood_in_any_dtype(family, dtype):
    model = tiny(family, dtype)
    head = head_or_reason(model)
    assert isinstance(head, Head), head
    check_head(model, head)
    check_causal(model)
    wrong = Head(head.weight, head.bias, head.scale * 1.05, head.softcap)
    assert "does not understand" in misfit(model, wrong)


def test_the_families_exercise_every_part_of_a_head():
    models = {family: tiny(family) for family in CONFIGS}
    heads = {family: head_of(model) for family, model in models.items()}
    for family, head in heads.items():
        assert head.scale == pytest.approx(SCALED.get(family, 1.0)), family
        assert head.softcap == (3.0 if family in CAPPED else None), family
        assert (head.bias is not None) == (family == "phi"), family
    for family in TIED:
        assert heads[family].weight is models[family].get_input_embeddings().weight
    assert heads["inkling"].weight.shape[0] == 290  # of 301 rows
    assert heads["opt"].weight.shape[1] == 16  # of 32 in the layers


@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_do_not_see_what_stands_behind_them(family):
    """Neither the tokens nor the length: state space scans, windows and experts included."""
    model = tiny(family)
    body, head = body_of(model), head_of(model)
    ids = torch.arange(1, 41)[None] * 13 % 301
    padded = torch.cat([ids.repeat(2, 1), ids.flip(1), (ids + 7) % 301])
    padded[0, 23:] = 0
    padded[1, 23:] = 299
    with torch.no_grad():
        alone = run_body(body, ids[:, :23], head)[0]
        together = run_body(body, padded, head)[:2, :23]
    allowed = 1e-5 * alone.abs().max().item()
    for row in together:
        torch.testing.assert_close(row, alone, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_have_the_dtype_of_the_head(dtype):
    """Mamba ends in float32 whatever its weights are, and its own head rounds that."""
    model = tiny("mamba", dtype)
    ids = torch.arange(1, 21)[None]
    head = head_of(model)
    assert body_of(model)(input_ids=ids).last_hidden_state.dtype == torch.float32
    assert run_body(body_of(model), ids, head).dtype == head.weight.dtype == dtype


_BERT = {
    "vocab_size": 301,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "is_decoder": True,
}


@pytest.mark.parametrize(
    "config",
    [
        tf.BertConfig(**_BERT),  # layers of its own in the head
        tf.RobertaConfig(**_BERT),
        tf.RemBertConfig(**_BERT, input_embedding_size=24, output_embedding_size=40),
        tf.ModernBertDecoderConfig(**{**_BERT, "pad_token_id": 0, "cls_token_id": 1}),
    ],
    ids=lambda config: config.model_type,
)
def test_a_head_of_several_layers_has_a_reason(config):
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    reason = head_or_reason(model)
    assert f"does not understand how {type(model).__name__} makes its logits" in reason
    check_causal(model)
    with pytest.raises(ModelError, match="does not understand .* nothing was done"):
        check_head(model, head_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_what_follows_is_refused(dtype):
    torch.manual_seed(0)
    config = tf.XLNetConfig(vocab_size=301, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    with pytest.raises(ModelError, match="depends on the tokens behind it"):
        check_causal(model.to(dtype))


def test_checks_leave_the_mode_of_a_model_alone():
    model = tiny("gpt2").train()
    check_causal(model)
    assert misfit(model, head_of(model)) is None and model.training  # dropout was off meanwhile
    assert misfit(model, Head(head_of(model).weight, softcap=1.0)) is not None and model.training


class Bare(tf.PreTrainedModel):
    """An embedding and a projection, with nothing that could be run alone."""

    config_class, base_model_prefix, _tied_weights_keys = tf.LlamaConfig, "body", None

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(301, 32)
        self.lm_head = torch.nn.Linear(32, 301, bias=False)

    def forward(self, input_ids):
        return tf.modeling_outputs.CausalLMOutput(logits=self.lm_head(self.embed_tokens(input_ids)))


class Tuples(Bare):
    """Its body answers without names."""

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Sequential(self.embed_tokens)
        self.body.forward = lambda input_ids: (self.embed_tokens(input_ids),)


def test_a_model_whose_body_cannot_run_alone_has_a_reason():
    bare, tuples = Bare(CONFIGS["llama"]()), Tuples(CONFIGS["llama"]())
    check_causal(bare)
    assert "Bare does not separate its body" in head_or_reason(bare)
    assert "answers without last_hidden_state" in head_or_reason(tuples)
    for model in (bare, tuples):
        with pytest.raises(ModelError):
            check_head(model, head_of(model))


def test_a_head_that_does_more_is_found_out():
    model = tiny("llama")
    plain = model.forward
    model.forward = lambda **inputs: _doubled(plain(**inputs))
    with pytest.raises(ModelError, match="does not understand how LlamaForCausalLM"):
        check_head(model, head_of(model))


def _doubled(answer):
    answer.logits = answer.logits * 2
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "change"), [("gemma3", "softcap"), ("granite", "scale")])
def test_what_a_config_hides_is_found_out_in_any_dtype(family, change, dtype):
    """A soft cap of 30 hardly shows in small logits, and not at all once they are rounded."""
    model = tiny(family, dtype)
    model.config.final_logit_softcapping = 30.0 if family == "gemma3" else None
    head = head_of(model)
    check_head(model, head)
    blind = {"softcap": None} if change == "softcap" else {"scale": head.scale * 1.05}
    with pytest.raises(ModelError, match="does not understand"):
        check_head(model, replace(head, **blind))


def test_an_adapted_output_projection_is_refused():
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ModelError, match="no plain linear layer: found peft"):
        head_of(model)
    assert "no plain linear layer: found peft" in head_or_reason(model)


def test_a_head_that_forbids_tokens_is_understood():
    """-inf in both is no difference."""
    model = tiny("phi")
    with torch.no_grad():
        model.get_output_embeddings().bias[::3] = -torch.inf
    assert misfit(model, head_of(model)) is None
    check_causal(model)
    doubled = replace(head_of(model), scale=2.0)
    assert "does not understand" in misfit(model, doubled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_products_of_their_operands(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 24).to(dtype), torch.randn(20_000, 24).to(dtype)
    grad = torch.randn(37, 20_000).to(dtype)
    back, out = torch.ones(37, 24), torch.ones(20_000, 24)
    exact = hidden.double() @ weight.double().T
    torch.testing.assert_close(project(hidden, weight).double(), exact, rtol=1e-5, atol=1e-5)
    add_pull_back(back, grad, weight)
    wanted = 1 + grad.double() @ weight.double()
    torch.testing.assert_close(back.double(), wanted, rtol=1e-4, atol=1e-3)
    add_turned(out, grad, hidden)
    wanted = 1 + grad.double().T @ hidden.double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
