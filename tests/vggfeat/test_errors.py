"""Failures in words: a line each."""

from __future__ import annotations

import pytest

from vggfeat.errors import CantWrite, UnreadableImage, VggfeatError, WrongUsage


@pytest.mark.parametrize("kind", [VggfeatError, WrongUsage, CantWrite, UnreadableImage])
def test_an_error_is_one_line_whatever_a_file_is_called(kind: type[VggfeatError]) -> None:
    assert str(kind("two  files: a\nb and\r\nc\u2028d")) == "two  files: a b and c d"
