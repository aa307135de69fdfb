"""Errors that are one sentence."""

import pytest

from crate_mini import UserError


def refused(match, call, *args, **kwargs):
    """Assert that a call raises a UserError of one sentence that matches."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
