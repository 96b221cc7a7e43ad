"""What the tests share: one thread unless a test asks for more, memory full of NaN until it is written, and restored switches."""

import pytest
import torch
from hypothesis import Phase, settings

settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=3000)  # pytest --hypothesis-profile=explore
settings.register_profile(
    "quick", deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def threads():
    """torch.set_num_threads, taken back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def nan_memory():
    """New tensors are full of NaN, so that an output nobody wrote cannot pass."""
    from ddim_fast.testing import nan_memory

    with nan_memory():
        yield


@pytest.fixture
def select():
    """extension.select, taken back after the test."""
    from ddim_fast.kernels import cpu_step

    if cpu_step.extension is None:
        pytest.fail(f"the C++ extension must be built for these tests: {cpu_step.missing_reason}")
    before = cpu_step.extension.selected()
    yield cpu_step.extension.select
    cpu_step.extension.select(before)
