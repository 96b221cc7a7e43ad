"""The oracle: its independence, its inverses, and the old names of its keywords."""

import ast
from pathlib import Path

import numpy as np
import pytest

from ddim_fast.verify.truth import oracle

KINDS = ("epsilon", "sample", "v_prediction", "flow", "score", "edm")
LEVELS = (0.3, oracle.NoiseLevel(0.4, 0.6), oracle.NoiseLevel(1.0, 7.0))


def test_the_oracle_imports_nothing_of_this_package():
    names = set()
    for node in ast.walk(ast.parse(Path(oracle.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.partition(".")[0])
    assert names == {"__future__", "collections", "dataclasses", "functools", "math", "numpy", "typing", "warnings"}


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
