"""The noise standard in torch operations: the words and normals of NumPy, without a wait for the device."""

import numpy as np
import pytest
import torch

import ddim_fast as df
from ddim_fast.gpu_lab.fake_cuda import fake_cuda
from ddim_fast.kernels import dispatch, noise, noise_in_torch, reference, triton_backend
from ddim_fast.kernels.contract import StepCoefficients, StepInputs
from ddim_fast.kernels.dispatch import ddim_step

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -(2**32), 2**32 - 1]
PLACES = [(0, 0), (2**32 - 1, 3), (2**31, 2**32 - 1)]
NOISE_ONLY = StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=1)


@pytest.fixture(params=["float64", "float32"])
def precision(request, monkeypatch):
    """Computed on a device with float64, and on one without."""
    monkeypatch.setattr(noise_in_torch, "has_float64", lambda device: request.param == "float64")
    return request.param


def bits(z):
    return np.ascontiguousarray(np.asarray(z)).view(np.int32)


@pytest.mark.parametrize(("step", "stream"), PLACES)
def test_words_are_those_of_the_standard(step, stream):
    first = 2**32 - 70
    counters = (torch.arange(140) + first) & 0xFFFFFFFF  # over the end of 32 bits
    found = torch.stack(noise_in_torch.philox_words(torch.tensor(SEEDS), counters, step, stream), dim=-1)
    assert found.dtype == torch.int64
    for seed, words in zip(SEEDS, found, strict=True):
        expected = noise.philox_words(seed, 140, step, stream, first)
        np.testing.assert_array_equal(words.numpy(), expected.astype(np.int64))


def test_no_product_needs_more_than_63_bits():
    """As integers without an end, and as int64: the same."""
    largest = (1 << 32) - 1
    for multiplier in (*noise.MULTIPLIERS, largest):
        for word in (0, 1, 0xFFFF, 0x10000, 1 << 31, largest):
            exact = multiplier * word
            assert noise_in_torch._product(multiplier, word) == (exact >> 32, exact & largest)
            upper, lower = noise_in_torch._product(multiplier, torch.tensor([word]))
            assert (int(upper), int(lower)) == (exact >> 32, exact & largest)


def corners():
    """Every kind of word: the corners of each formula, and many others."""
    rng = np.random.default_rng(0)
    found = np.array([0, 1, 2, 127, 128, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 32) - 1], np.uint32)
    near = np.rint((np.float64(2) ** np.arange(1, 32)[:, None] * [np.sqrt(0.5), 1.0]).ravel())
    found = np.concatenate([found, near.astype(np.uint32), near.astype(np.uint32) - 1])
    a, b = (grid.ravel() for grid in np.meshgrid(found, found))
    more = rng.integers(0, 1 << 32, (2, 1 << 15), dtype=np.uint32)
    return np.concatenate([a, more[0]]), np.concatenate([b, more[1]])


def test_normals_are_those_of_the_standard_with_float64_and_without(precision):
    """Bit by bit with float64. Without it the last bit is not promised; of these words none differs."""
    a, b = corners()
    expected = noise.words_to_normals(np.stack([a, b, a, b], axis=-1))
    found = noise_in_torch.words_to_normals(*(torch.from_numpy(words.astype(np.int64)) for words in (a, b)))
    for got, want in zip(found, (expected[:, 0], expected[:, 1]), strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_array_equal(bits(got), bits(want))


def test_a_multiply_add_is_rounded_once_or_nearly(precision):
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(1 << 14).astype(np.float32) for _ in range(3))
    c[::2] = -a[::2] * b[::2]  # nearly nothing is left
    exact = noise.fma(a, b, c)
    got = noise_in_torch.fma(*map(torch.from_numpy, (a, b, c))).numpy()
    if precision == "float64":
        np.testing.assert_array_equal(bits(got), bits(exact))
    assert np.all(np.abs(got - exact) <= np.finfo(np.float32).eps * np.abs(exact))
    assert (np.abs(a * b + c - exact) > 0).mean() > 0.1  # what an ordinary sum gives


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 127, 128, 129, 1000])
def test_samples_of_every_length_are_those_of_the_standard(monkeypatch, n):
    monkeypatch.setattr(noise_in_torch, "_CHUNK", 8 * 30)  # counters: several chunks
    for step, stream in PLACES[:2]:
        got = noise_in_torch.standard_normals(torch.tensor(SEEDS), n, step, stream)
        expected = noise.standard_normals(SEEDS, n, step, stream)
        assert got.shape == (len(SEEDS), n)
        np.testing.assert_array_equal(bits(got), bits(expected))
    assert noise_in_torch.standard_normals(torch.zeros(0, dtype=torch.int64), n, 0).shape == (0, n)


@pytest.mark.parametrize("n", [-1, noise.MAX_ELEMENTS + 1])
def test_count_of_elements_is_checked(n):
    with pytest.raises(ValueError, match=f"a sample may have 0 to 17179869184 elements, got {n}"):
        noise_in_torch.standard_normals(torch.tensor([1]), n, 0)


# --- Where it runs ------------------------------------------------------------------------------------------------------


def test_a_step_on_another_device_reads_nothing_on_the_host():
    """On "meta" there is nothing to read: a step that did would fail."""
    x, seeds = torch.zeros(2, 3, 5, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    z = reference.run(StepInputs(x, x, NOISE_ONLY, seeds=seeds))
    assert (z.device.type, z.shape) == ("meta", x.shape)


def test_a_step_of_the_reference_on_a_device_has_the_standards_noise(monkeypatch):
    """The path of another device, taken on the CPU."""
    monkeypatch.setattr(reference, "on_the_host", lambda x_t: False)
    x, seeds = torch.zeros(3, 2, 65), torch.tensor([5, -6, 7])
    mask = (torch.arange(65) % 2).float().expand(3, 2, 65)
    row = StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=1, known_noise=1)
    options = dict(seeds=seeds, noise_step=9, noise_stream=2)
    got = ddim_step(x, x, row, mask=mask, known_x0=x, backend="reference", **options)
    assert torch.equal(got, ddim_step(x, x, row, mask=mask, known_x0=x, backend="cpu", **options))


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(triton_backend, "missing_reason", lambda: "Triton is not there (test)")
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.mark.usefixtures("without_triton")
def test_a_device_without_a_kernel_is_warned_of_once_and_never_waited_for():
    with fake_cuda() as device:
        x, m = (torch.empty(2, 3, 8, 8, device="cuda") for _ in range(2))
        seeds = torch.zeros(2, dtype=torch.int64, device="cuda")
        row = df.DDIMSampler(df.NoiseSchedule.linear(), 3, 1.0).plan().steps[0].coefficients
        inputs = StepInputs(x, m, row, seeds=seeds, x_prev=x)
        with pytest.warns(UserWarning, match="runs its PyTorch reference, which is slower: Triton is not there"):
            dispatch.run(inputs)
        with device.steady_state() as steady:  # which refuses a wait, and pytest a second warning
            dispatch.run(inputs)
        assert steady.syncs == steady.copies == []


def test_what_is_missing_is_said_of_each_kind_of_device(monkeypatch):
    assert dispatch._missing_kernel("mps") == "it has no kernel for mps"
    assert dispatch._missing_kernel("meta") is None
    assert dispatch._missing_kernel("cuda") is None  # Triton is there
    monkeypatch.setattr(triton_backend, "missing_reason", triton_backend.missing_reason.__wrapped__)  # looks again
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    assert dispatch._missing_kernel("cuda") == "Triton is not installed: pip install triton"
