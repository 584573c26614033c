"""Text as a caller sees it: whole characters, and nothing of what ends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.data.tokenizer import build_tokenizer
from gshardx.infer.text import TextStream

BYTES = build_tokenizer("bytes", 0, [])


def shown(text, stops=(), cut=None):
    """Pieces as the tokens of ``text`` come, one a byte, the last ``cut`` left out."""
    stream, pieces = TextStream(BYTES, stops), []
    for token in BYTES.encode(text)[: None if cut is None else -cut]:
        piece = stream.add(int(token))
        pieces.append(piece.text)
        if piece.stopped:
            return pieces, True
    last = stream.end()
    return [*pieces, last.text], last.stopped


@given(text=st.text(max_size=20), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop(text, stops):
    found = [text.find(stop) for stop in stops if stop in text]
    pieces, stopped = shown(text, stops)
    assert "".join(pieces) == text[: min(found, default=len(text))]
    assert stopped == bool(found)


def test_no_piece_splits_a_character():
    assert shown("aé€😀")[0] == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_a_character_that_never_ends_is_marked():
    assert "".join(shown("a€", cut=1)[0]) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("one\n\ntwo", ("\n\n",), ["o", "n", "e", "", ""]),
        ("ab abc", ("abc",), ["", "", "ab ", "", "", ""]),
        ("aab", ("ab",), ["", "a", ""]),
        ("ab", ("abc",), ["", "", "ab"]),
    ],
)
def test_what_may_begin_a_stop_is_held_back(text, stops, pieces):
    assert shown(text, stops)[0] == pieces
