"""What a pointer file must do on every file system."""

from __future__ import annotations

from pipeline.tables.pointer import read_versioned, replace_if


def check_pointer(path: str, foreign: str) -> None:
    """A pointer that is not there yet is replaced only if it is what was read.

    Args:
      path: of the pointer.
      foreign: a version in the file system's form that the pointer never has.
    """
    assert read_versioned(path) == ("", "")
    assert not replace_if(path, "a\n", foreign)
    assert read_versioned(path) == ("", "")

    assert replace_if(path, "a\n", "")
    text, first = read_versioned(path)
    assert text == "a\n" and first
    assert not replace_if(path, "b\n", "")  # it exists by now

    assert replace_if(path, "b\n", first)
    text, second = read_versioned(path)
    assert text == "b\n" and second not in ("", first)
    assert not replace_if(path, "c\n", first)
    assert read_versioned(path) == ("b\n", second)
