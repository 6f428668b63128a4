"""Where sentences end: the rules of Unicode's UAX 29 (SB3 to SB11), with the differences that prose needs.

- The end of a line is a space, because much text is wrapped; an empty line ends a paragraph and its sentence (SB4).
- `. ? !` end a sentence only before white space (SB6 and SB7 for all of them), so `www.example.com` has none.
- A full stop after an English title or a single capital ends none: `Mr. Smith`, `J. Smith`, `U.S. law`.

No library does it: tensorflow_text's StateBasedSentenceBreaker ends a sentence inside 3.14 and at every "Mr.", uniseg
reads 25 kB/s, and sentencex fails with a panic on some texts of random Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Optional

SENTENCE_RULE = 1  # part of the fingerprint of tables with --chunk_by=sentence: raise it whenever ends move
_SPACES = frozenset(" \t\n\r")
# STerm of other scripts, which needs no space after it.
_WIDE = (
    "\u0589\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u166e\u1803\u1809"
    "\u203c\u203d\u2047\u2048\u2049\u3002\ua4ff\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)
_NARROW = frozenset(".!?\u2026")
_MARKS = _NARROW.union(_WIDE)
_CLOSE = frozenset("\"')]}*_\u00bb\u2019\u201d\u203a\u300d\u300f\u3011\u3009\u300b\uff09\uff3d\uff5d\uff63")
_LAST = _MARKS | _CLOSE | _SPACES | {"\u2029"}
_PARAGRAPH = re.compile(r"\n[ \t]*+\r?\n")
_CONTINUES = frozenset(",;:-\u2013\u2014\u3001\uff0c")  # SContinue (SB8a)
_ABBREVIATION = re.compile(r"(?<!\w)(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Rep|Sen|Rev|vs|[^\W\d_])\Z")
_LONGEST_ABBREVIATION = 5


def find_last_sentence_end(text: str, places: Sequence[int]) -> Optional[int]:
    """The index of the last of the places at which a sentence ends; None if there is none."""
    for i in range(len(places) - 1, -1, -1):
        at = places[i]
        last = text[at - 1]
        if last == " ":
            last = text[at - 2]
        if last in _LAST and ends_sentence(text, at):  # few places pass the first check, which is fast
            return i
    return None


def ends_sentence(text: str, at: int) -> bool:
    """Whether a sentence ends at a place in a text, the white space after it included; not at the end of the text.

    It reads the marks, closing marks and white space around the place, and nothing of a run of them that goes on.
    """
    if not 0 < at < len(text) or text[at] in _SPACES:
        return False
    following = text[at]
    close_end = _skip_back(text, at, _SPACES)
    if close_end and text[close_end - 1] == "\u2029":
        return True
    mark_end = _skip_back(text, close_end, _CLOSE)
    if not mark_end or text[mark_end - 1] not in _MARKS:
        return at - close_end > 1 and _PARAGRAPH.search(text, close_end, at) is not None
    if close_end == at and (following in _CLOSE or (mark_end == at and following in _MARKS)):
        return False  # the run goes on
    return not _continues(text, _skip_back(text, mark_end, _MARKS), mark_end, following, has_space=close_end < at)


def _skip_back(text: str, end: int, characters: frozenset[str]) -> int:
    """The begin of the run of characters that ends at a place."""
    while end and text[end - 1] in characters:
        end -= 1
    return end


def _continues(text: str, begin: int, end: int, following: str, has_space: bool) -> bool:
    """Whether a sentence goes on after the marks `text[begin:end]`."""
    if following in _CONTINUES or (text[end - 1] in _NARROW and not has_space):
        return True
    if text[begin] not in ".\u2026":
        return False
    is_stop = end - begin == 1 and text[begin] == "."
    title = _ABBREVIATION.search(text[max(0, begin - _LONGEST_ABBREVIATION) : begin]) if is_stop else None
    return following.islower() or (title is not None and (title[0] == "vs" or title[0][0].isupper()))
