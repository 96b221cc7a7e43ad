"""docs/FINDINGS.md: the Python of each finding fails, here and now, as the page says that it does."""

import warnings

import pytest
from page_examples import examples

EXAMPLES = examples("FINDINGS.md")
NOT_INSTALLED = {"azula": 1}
"""Libraries that the tests do without, and how many findings are about each."""


def fails(example):
    """Whether an example ends as a finding does, and not by another error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that are examined
        try:
            example.run({})
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line-{example.line}")
def test_each_finding_is_found(example):
    missing = [name for name in NOT_INSTALLED if f":{name.title()}'" in example.code]
    if missing:
        with pytest.raises(ImportError, match=f"needs {missing[0]}"):
            example.run({})
        return
    assert fails(example)


def test_few_need_a_library_that_is_not_here():
    for name, count in NOT_INSTALLED.items():
        assert sum(f":{name.title()}'" in example.code for example in EXAMPLES) == count
