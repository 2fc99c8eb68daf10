"""Adding a product of half-precision operands to float32, in place where the device can."""

import pytest
import torch

from prift import products


def test_a_device_without_the_wide_addmm_is_found_out():
    """A CPU's torch has neither wide product; what is not there is no exception."""
    assert not products._adds_in_place(torch.device("cpu"), torch.bfloat16)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 has it for CUDA alone")
def test_torch_has_the_addmm_that_is_called():
    """On the meta device: the signature and the shapes, without arithmetic."""
    assert products._adds_in_place(torch.device("meta"), torch.bfloat16)
    out = torch.empty(6, 5, device="meta")
    a = torch.empty(7, 6, device="meta", dtype=torch.bfloat16)
    products.add_wide(out, a.T, torch.empty(7, 5, device="meta", dtype=torch.bfloat16))
    with pytest.raises(RuntimeError):
        products.add_wide(out, a, a)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_added_on_a_gpu(dtype, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device="cuda").to(dtype) for n in (300, 2000))
    grad = torch.randn(300, 2000, device="cuda").to(dtype)
    for in_place in (products._adds_in_place, lambda *_: False):
        monkeypatch.setattr(products, "_adds_in_place", in_place)
        back, turned = torch.ones(300, 64, device="cuda"), torch.ones(2000, 64, device="cuda")
        products.add_pull_back(back, grad, weight)
        products.add_turned(turned, grad, hidden)
        for found, exact in (
            (back, 1 + grad.double() @ weight.double()),
            (turned, 1 + grad.double().T @ hidden.double()),
        ):
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
