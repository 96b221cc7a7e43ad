"""The public fallbacks for torch's private names give the same answers as the names themselves."""

import pytest
import torch
from torch.autograd import forward_ad

from ddim_fast.kernels import torch_internals


@pytest.fixture(params=["private names", "fallbacks"], autouse=True)
def _names(request, monkeypatch):
    if request.param == "fallbacks":
        for name in ("_is_functorch_wrapped", "_is_alias_of", "FORWARD_AD_LEVEL", "_level"):
            assert getattr(torch_internals, name) is not None
            monkeypatch.setattr(torch_internals, name, None)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_wrapped_tensors_are_found(transform):
    seen = []

    def function(x):
        seen.append(torch_internals.is_wrapped(x))
        return x.sum()

    transform(function)(torch.ones(3))
    assert seen == [True]
    for plain in (torch.ones(2), torch.empty(0), torch.ones(2, device="meta")):
        assert not torch_internals.is_wrapped(plain)


def test_what_belongs_to_no_transform_is_below_what_belongs_to_one():
    outside, seen = torch.ones(3), []

    def function(x):
        seen.append((torch_internals.transform_level(x), torch_internals.transform_level(outside)))
        return x.sum()

    torch.func.vmap(function)(torch.ones(2, 3))
    assert seen[0][0] > seen[0][1] == torch_internals.transform_level(outside)


def test_views_share_storage_and_copies_do_not():
    x = torch.ones(4)
    assert torch_internals.shares_storage(x, x[2:])
    assert not torch_internals.shares_storage(x, x.clone())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::DeprecationWarning:torch.*")  # torch's own
def test_forward_derivatives_are_found():
    x = torch.ones(2)
    assert not torch_internals.takes_forward_derivatives([x])
    with forward_ad.dual_level():
        assert torch_internals.takes_forward_derivatives([x, forward_ad.make_dual(x, x)])


def test_writes_are_counted():
    x = torch.ones(2)
    before = getattr(x, torch_internals.WRITE_COUNT)
    torch_internals.increment_version([x])
    assert getattr(x, torch_internals.WRITE_COUNT) == before + 1


def test_what_torch_would_not_write_is_told_apart():
    """By names that have no public fallback: without them, torch's own error is raised."""
    leaf = torch.ones(2, 3, requires_grad=True)
    assert torch_internals.has_no_memory(torch._efficientzerotensor((2,)))
    assert not torch_internals.has_no_memory(torch.zeros(2))
    assert torch_internals.is_view_of_leaf(leaf[0])
    assert not torch_internals.is_view_of_leaf(leaf)
    assert not torch_internals.is_view_of_leaf((leaf * 1)[0])
    buffer = torch.ones(2, 3)
    assert torch_internals.is_recorded_apart(buffer.unbind(0)[0])
    assert not torch_internals.is_recorded_apart(buffer[0])
    assert not torch_internals.is_recorded_apart(buffer)
