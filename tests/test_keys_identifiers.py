from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import InputError
from keys.identifiers import check_device_id


@pytest.mark.parametrize("text", ["a", "7", "camera-01", "a-", "x" * 63])
def test_a_device_id_comes_back_unchanged(text: str):
    assert check_device_id(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "-a", "A", "camera_01", "camera.01", "..", "../a", "a/b", "a\\b", "a\n", "a\0", "a b", "é", "٣", "x" * 64],
)
def test_anything_else_is_refused_with_the_value_in_the_sentence(text: str):
    with pytest.raises(InputError, match="is not a device id; use 1 to 63 of") as caught:
        check_device_id(text)
    assert repr(text) in str(caught.value)


@settings(deadline=None)
@given(st.text())
def test_what_passes_is_one_safe_folder_name(text: str):
    try:
        check_device_id(text)
    except InputError:
        return
    assert text.isascii()
    assert text == text.lower()
    assert not set(text) & set("/\\.\0\n :")
