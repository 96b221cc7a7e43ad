"""Names with options on a command line."""

import pytest

from ddim_fast.utils.named_options import split_options


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("edm", "edm", {}),
        ("edm?", "edm", {}),
        ("edm?rho=5&sigma_max=5e1", "edm", {"rho": 5, "sigma_max": 50.0}),
        ("a:B?c=true&d=null&e=[1,2]", "a:B", {"c": True, "d": None, "e": [1, 2]}),
    ],
)
def test_values_are_json(text, name, options):
    for words in (False, True):
        assert split_options(text, "a thing", "x?y=1", words=words) == (name, options)


def test_words_are_text_where_they_may_be():
    text = "a:B?kind=sde-dpmsolver++&other=heun=2"
    assert split_options(text, "it", "x?y=1", words=True)[1] == {"kind": "sde-dpmsolver++", "other": "heun=2"}
    with pytest.raises(ValueError, match="an argument of it must be a number, true or false, got 'kind=sde"):
        split_options(text, "it", "x?y=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a?b", "the arguments of it must be name=value, joined by &, got 'b': for instance x[?]y=1"),
        ("a?=3", "got '=3'"),
        ("a?b=1&&c=2", "got ''"),
        ("a?b=1&b=2", "an argument of it must be given once, got 'b' twice: leave one out"),
        ("a?b=", "an argument of it must be a number, true, false or a word, got 'b='"),
    ],
)
def test_what_is_no_option_is_told(text, said):
    with pytest.raises(ValueError, match=said):
        split_options(text, "it", "x?y=1", words=True)
