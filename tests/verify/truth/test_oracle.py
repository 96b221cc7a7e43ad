"""The oracle: its independence, its inverses, and the old names of its keywords."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

from ddim_fast.verify.truth import oracle, paths

KINDS = ("epsilon", "sample", "v_prediction", "flow", "score", "edm")
LEVELS = (0.3, oracle.NoiseLevel(0.4, 0.6), oracle.NoiseLevel(1.0, 7.0))


@pytest.mark.parametrize(("module", "beside"), [(oracle, set()), (paths, {"oracle"})])
def test_the_oracle_imports_nothing_of_this_package(module, beside):
    names, own = set(), set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            (own if node.level else names).add(node.module.partition(".")[0])
    allowed = {"__future__", "collections", "dataclasses", "functools", "json", "math", "numpy", "typing", "warnings"}
    assert names <= allowed
    assert own == beside


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_output_is_taken_apart_and_put_together_again(kind, level):
    rng = np.random.default_rng(0)
    x_t, output = rng.standard_normal((2, 3, 5))
    x0, eps = oracle.split(kind, x_t, output, level)
    alpha, sigma = oracle.alpha_sigma(level)
    np.testing.assert_allclose(oracle.model_output(kind, x0, eps, level), output, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x_t, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("call", [oracle.split, oracle.model_output, oracle.textbook_step])
def test_an_unknown_prediction_type_is_refused(call):
    with pytest.raises(ValueError, match="velocity"):
        call(
            "velocity", np.zeros((1, 1)), np.zeros((1, 1)), *([0.3] if call is not oracle.textbook_step else [0.3, 0.6])
        )


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_row_is_the_step(kind, again):
    x_t, output = np.random.default_rng(0).standard_normal((2, 3, 5))
    row = oracle.textbook_row(kind, 0.3, 0.6, use_clipped_model_output=again)
    of_x, of_m = oracle.fold(row)
    exact, _ = oracle.textbook_step(kind, x_t, output, 0.3, 0.6)
    np.testing.assert_allclose(of_x * x_t + of_m * output, exact, rtol=1e-14, atol=1e-14)


def test_old_keywords_work_with_a_warning():
    x_t, output, z = np.random.default_rng(0).standard_normal((3, 2, 3))
    new = {"eta": 0.3, "clip": 0.5, "eta_scales": "variance", "use_clipped_model_output": True}
    old = {"eta": 0.3, "clip": 0.5, "convention": "variance", "rederive": True}
    with pytest.warns(DeprecationWarning, match="textbook_row.*0.3: call it"):
        assert oracle.textbook_row("epsilon", 0.3, 0.6, **old) == oracle.textbook_row("epsilon", 0.3, 0.6, **new)
    with pytest.warns(DeprecationWarning, match="textbook_step.*0.3: call it"):
        found = oracle.textbook_step("epsilon", x_t, output, 0.3, 0.6, noise=z, **old)
    for one, other in zip(found, oracle.textbook_step("epsilon", x_t, output, 0.3, 0.6, noise=z, **new), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.warns(
        DeprecationWarning, match=r"std_dev\(convention=...\) ends with ddim_fast 0.3: call it eta_scales"
    ):
        assert oracle.std_dev(0.3, 0.6, 0.5, convention="variance") == oracle.std_dev(0.3, 0.6, 0.5, "variance")


@pytest.mark.parametrize("text", ["flow", "flow?shift=3&time_scale=1000", "edm", "ve", "vp", "trigonometric"])
def test_a_paths_levels_times_and_inverses(text):
    path = paths.path_of(text)
    for count in (1, 2, 7):
        times = path.times(count)
        assert len(times) == count
        assert times[0] == pytest.approx(path.first, rel=1e-14)
        assert all(a > b for a, b in zip(times, [*times[1:], 0.0], strict=True))
    ratios = [level.sigma / level.alpha for level in map(path.level, path.times(9)) if level.alpha]
    assert ratios == sorted(ratios, reverse=True)
    for t in path.times(5):
        assert path.time_told(path.told(t)) == pytest.approx(t, rel=1e-13)
    if path.starts_at_unit_scale:
        assert all(np.hypot(*path.level(t)) == pytest.approx(1, rel=1e-14) for t in path.times(9))


def test_only_paths_in_continuous_time_are_paths():
    assert paths.path_of("linear") is None
    assert set(paths.PATHS) == {"flow", "edm", "ve", "vp", "trigonometric"}


@pytest.mark.parametrize("level_s", [0.6, 1.0])
def test_a_pair_that_is_variance_preserving_is_its_alpha_bar(level_s):
    pair_t, pair_s = (oracle.alpha_sigma(bar) for bar in (0.3, level_s))
    assert oracle.std_dev(pair_t, pair_s, 0.7) == pytest.approx(oracle.std_dev(0.3, level_s, 0.7), rel=1e-14)
    np.testing.assert_allclose(
        oracle.ddpm_posterior(pair_t, pair_s), oracle.ddpm_posterior(0.3, level_s), rtol=1e-13, atol=1e-15
    )
    rows = [oracle.textbook_row("v_prediction", *levels, eta=0.7) for levels in ((pair_t, pair_s), (0.3, level_s))]
    assert rows[0] == pytest.approx(rows[1], rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("sigma", [1.0, 0.8, 0.3])
def test_flow_grpos_noise_is_its_sde_and_cps_that_of_its_paper(sigma):
    """Euler-Maruyama's step in x and v; and x0 and x1 with the sine and the cosine."""
    x, v, z, level, sigma_prev = 0.3, -1.1, 0.7, 0.6, 0.75 * sigma
    at = oracle.NoiseLevel(1 - sigma, sigma), oracle.NoiseLevel(1 - sigma_prev, sigma_prev)
    dt = sigma_prev - sigma
    diffusion = level * math.sqrt(sigma / (1 - (sigma_prev if sigma == 1 else sigma)))
    drift = v + diffusion**2 / (2 * sigma) * (x + (1 - sigma) * v)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    sine, cosine = math.sin(level * math.pi / 2), math.cos(level * math.pi / 2)
    expected = {
        "flow_grpo": x + drift * dt + diffusion * math.sqrt(-dt) * z,
        "cps": (1 - sigma_prev) * x0 + sigma_prev * (cosine * x1 + sine * z),
    }
    for eta_scales, wanted in expected.items():
        row = oracle.textbook_row("flow", *at, eta=level, eta_scales=eta_scales)
        got = oracle.row_step(row, np.array([x]), np.array([v]), noise=np.array([z])).x_prev
        np.testing.assert_allclose(got, wanted, rtol=1e-13)
