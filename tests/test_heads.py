"""Heads against the model's own logits, family by family."""

from dataclasses import replace

import pytest
import torch

from prift.errors import ModelError
from prift.heads import body_of, check_head, head_of
from prift.products import accumulate, project, pull_back
from tests.families import CONFIGS, tiny


@pytest.mark.parametrize("family", CONFIGS)
def test_head_equals_the_models_own_logits(family):
    model = tiny(family)
    ids = torch.arange(20)[None] * 13 % 301
    with torch.no_grad():
        hidden = body_of(model)(input_ids=ids).last_hidden_state[0]
        own = model(input_ids=ids).logits[0]
    torch.testing.assert_close(head_of(model).logits(hidden), own, rtol=1e-5, atol=1e-5)
    check_head(model, head_of(model))


def test_the_families_exercise_every_part_of_a_head():
    heads = {family: head_of(tiny(family)) for family in CONFIGS}
    assert heads["gemma2"].softcap == 3.0
    assert heads["cohere"].scale == 0.25 and heads["granite"].scale == 0.25
    assert heads["phi"].bias is not None
    tied = tiny("llama-tied")
    assert head_of(tied).weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_allows_the_rounding_of_half_precision(dtype):
    for family in ("llama", "gemma2", "granite"):
        model = tiny(family, dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_products_of_their_operands(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 24).to(dtype), torch.randn(20_000, 24).to(dtype)
    grad, out = torch.randn(37, 20_000), torch.zeros(20_000, 24)
    exact = hidden.double() @ weight.double().T
    torch.testing.assert_close(project(hidden, weight).double(), exact, rtol=1e-5, atol=1e-5)
    back = grad.double() @ weight.double()
    torch.testing.assert_close(pull_back(grad, weight).double(), back, rtol=1e-4, atol=1e-3)
    accumulate(out, grad, hidden)
    wanted = grad.double().T @ hidden.double()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
