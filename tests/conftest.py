"""What the tests share: one thread unless a test asks for more, memory full of NaN until it is written, restored switches, a browser.

Tests marked ``browser`` run where Chromium and its driver are, those marked ``docs`` where the extra docs is installed. Elsewhere they
are deselected, which pytest's last line tells, and not skipped; with DDIM_FAST_REQUIRE_BROWSER=1 they run everywhere, and fail without one.
"""

import importlib.util
import os
import shutil

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


# --- A browser --------------------------------------------------------------------------------------------------------

BROWSER_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def pytest_collection_modifyitems(config, items):
    required = os.environ.get("DDIM_FAST_REQUIRE_BROWSER") == "1"
    there = {
        "browser": required or (shutil.which("chromium") and shutil.which("chromedriver")),
        "docs": importlib.util.find_spec("sphinx") and importlib.util.find_spec("nbclient"),
    }
    missing = [marker for marker, found in there.items() if not found]
    without = [item for item in items if any(item.get_closest_marker(marker) for marker in missing)]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, place in places.items() if place is None]:
        pytest.fail(f"DDIM_FAST_REQUIRE_BROWSER=1, but there is no {' and no '.join(missing)} here")
    options = webdriver.ChromeOptions()
    options.binary_location = places["chromium"]
    for flag in (*BROWSER_FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(places["chromedriver"]))
    yield driver
    driver.quit()
