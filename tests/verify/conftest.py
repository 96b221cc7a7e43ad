"""Tests marked ``browser`` run where Chromium and its driver are. Elsewhere they are deselected, which pytest's last line tells, and not
skipped; with DDIM_FAST_REQUIRE_BROWSER=1 they run everywhere, and fail without one."""

import os
import shutil


def pytest_collection_modifyitems(config, items):
    if os.environ.get("DDIM_FAST_REQUIRE_BROWSER") == "1" or (
        shutil.which("chromium") and shutil.which("chromedriver")
    ):
        return
    without = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]
