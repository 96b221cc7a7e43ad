"""Where a library draws from torch's global generator, it draws from another, and that is given back."""

import torch

from ddim_fast.utils.random_state import global_generator


def test_the_global_generator_goes_on_from_the_source_and_is_given_back():
    source, twin = (torch.Generator().manual_seed(5) for _ in range(2))
    before = torch.get_rng_state()
    with global_generator(source):
        drawn = torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.randn(3, generator=twin))
    assert torch.equal(torch.randn(3, generator=source), torch.randn(3, generator=twin))
