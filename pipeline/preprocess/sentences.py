"""Where sentences end: the rules of Unicode's UAX 29 (SB3 to SB11), with the differences that prose needs.

- The end of a line is a space, because much text is wrapped; an empty line ends a paragraph and its sentence (SB4).
- `. ? !` end a sentence only before white space (SB6 and SB7 for all of them), so `www.example.com` has none.
- A full stop after an English title or a single capital ends none: `Mr. Smith`, `J. Smith`, `U.S. law`.

No library does it: tensorflow_text's StateBasedSentenceBreaker ends a sentence inside 3.14 and at every "Mr.", uniseg
reads 25 kB/s, and sentencex fails with a panic on some texts of random Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SENTENCE_RULE = 1  # part of the fingerprint of tables with --chunk_by=sentence: raise it whenever ends move
_SPACES = " \t\n\r"
# STerm of other scripts, which needs no space after it.
_WIDE = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u166e\u1803\u1809"
    "\u203c\u203d\u2047-\u2049\u3002\ua4ff\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)
_NARROW = ".!?\u2026"
_CLOSE = "\"')\\]}*_\u00bb\u2019\u201d\u203a\u300d\u300f\u3011\u3009\u300b\uff09\uff3d\uff5d\uff63"
_END = re.compile(
    rf"(?<![{_WIDE}{_NARROW}])(?P<mark>[{_WIDE}{_NARROW}]++)[{_CLOSE}]*+(?P<space>[{_SPACES}]*+)"
    rf"|\r?\n[ \t]*+\r?\n[{_SPACES}]*+|\u2029[{_SPACES}]*+"
)
_CONTINUES = ",;:-\u2013\u2014\u3001\uff0c"  # SContinue (SB8a)
_ABBREVIATION = re.compile(r"(?<!\w)(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Rep|Sen|Rev|vs|[^\W\d_])\Z")
_LONGEST_ABBREVIATION = 5


def find_sentence_ends(text: str) -> Iterator[int]:
    """Yields the places at which sentences end, with the white space after them, ascending; not the end of the text."""
    for found in _END.finditer(text):
        if found.end() < len(text) and not _continues(text, found):
            yield found.end()


def _continues(text: str, found: re.Match[str]) -> bool:
    """Whether a sentence goes on after a mark."""
    mark, following = found["mark"], text[found.end()]
    if not mark:  # the end of a paragraph
        return False
    if following in _CONTINUES or (mark[-1] in _NARROW and not found["space"]):
        return True
    if mark[0] not in ".\u2026":
        return False
    before = text[max(0, found.start() - _LONGEST_ABBREVIATION) : found.start()]
    title = _ABBREVIATION.search(before) if mark == "." else None
    return following.islower() or (title is not None and (title[0] == "vs" or title[0][0].isupper()))
