"""Who may come in, who no longer may, and that neither messages nor the time it takes say more."""

import logging
import os
import statistics
import time

import pytest

from gshardx.errors import BadInput
from gshardx.infer.server import keys
from gshardx.infer.server.keys import Keys

ADA, BOB, EVE = "ada-0123456789abcdef", "bob-0123456789abcdef", "eve-0123456789abcdef"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    return file


@pytest.fixture
def clock(monkeypatch):
    """Seconds, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(keys, "monotonic", lambda: now[0])
    return now


def test_a_key_has_the_name_that_stands_before_it_or_that_of_its_line(path):
    path.write_text(f"# ours\n\n{ADA}\n  bob@home:   {BOB}  \n#{EVE}\n")
    known = Keys(path)
    assert [known.owner(key) for key in (ADA, BOB)] == ["key-3", "bob@home"]
    for key in (EVE, "", None, ADA[:-1], ADA + " ", f"bob@home: {BOB}", "\ud800", "é", "#", f"#{EVE}"):
        assert known.owner(key) is None


def test_a_name_may_have_several_keys(path):
    path.write_text(f"ada: {ADA}\nada: {BOB}\n")
    known = Keys(path)
    assert known.owner(ADA) == known.owner(BOB) == "ada"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no API keys in it.*token_urlsafe"),
        ("# none\n\n", "no API keys in it"),
        (f"{ADA}\nada: {ADA[:15]}\n", r"line 2: a key of less than 16 characters; make one by: python -c \"import sec"),
        (f"{ADA}\n{BOB}\neve: {ADA}\n", "line 3: the key of line 1 again"),
        (f"ada:{ADA}", "line 1: neither a key nor 'name: key'"),
        (f": {ADA}", "line 1: neither"),
        (f"{ADA} # Ada's", "line 1: neither"),
        (f"ada bob: {ADA}", "line 1: neither"),
        (b"\xff\xfe" + ADA.encode(), "not UTF-8"),
    ],
)
def test_a_file_that_is_wrong_at_the_start_is_refused_without_its_keys(path, content, said):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=said) as refused:
        Keys(path)
    assert "\n" not in str(refused.value)
    assert ADA[:15] not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(path):
    path.unlink()
    with pytest.raises(BadInput, match="can't read the API keys"):
        Keys(path)
    with pytest.raises(BadInput, match="can't read the API keys"):
        Keys(path.parent)


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)])
def test_a_file_that_others_may_read_is_warned_of(path, caplog, mode, warnings):
    path.write_text(ADA)
    path.chmod(mode)
    assert Keys(path).owner(ADA) == "key-1"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warnings
    assert caplog.text.count(f"chmod 600 {path}") == warnings


def test_a_changed_file_counts_after_a_second(path, clock):
    path.write_text(f"{ADA}\n{BOB}\n")
    known = Keys(path)
    path.write_text(f"{BOB}\n{EVE}\n")
    clock[0] += 0.9
    assert known.owner(ADA) == "key-1"
    clock[0] += 0.1
    assert [known.owner(key) for key in (ADA, BOB, EVE)] == [None, "key-1", "key-2"]


def test_a_file_in_its_place_of_the_same_size_and_time_counts_too(path, clock):
    path.write_text(ADA)
    known, before = Keys(path), path.stat()
    other = path.with_name("other")
    other.write_text(EVE)
    other.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock[0] += 1
    assert [known.owner(key) for key in (ADA, EVE)] == [None, "key-1"]


def test_a_file_is_not_read_again_before_it_changes(path, clock, monkeypatch):
    path.write_text(ADA)
    known = Keys(path)
    monkeypatch.setattr(keys, "_owners", lambda path: pytest.fail("read again"))
    for _ in range(5):
        clock[0] += 10
        assert known.owner(ADA) == "key-1"


@pytest.mark.parametrize("content", [None, "", "# none\n", "short", b"\xff", f"{ADA}\n{ADA}\n"])
def test_a_file_that_goes_wrong_later_keeps_everybody_out_and_is_one_line(path, clock, caplog, content):
    path.write_text(f"{ADA}\n{BOB}\n")
    known = Keys(path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(5):
        clock[0] += 1
        assert known.owner(ADA) is None
        assert known.owner("") is None
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("gshardx.server", logging.ERROR)
    assert record.getMessage().startswith(f"no API key is accepted: {path}")
    assert "\n" not in record.getMessage()
    assert ADA not in caplog.text
    path.touch(mode=0o600)
    path.write_text(f"{BOB}\n")
    clock[0] += 1
    assert [known.owner(key) for key in (ADA, BOB)] == [None, "key-1"]


def test_keys_are_nowhere_to_be_read(path):
    path.write_text(f"ada: {ADA}\n")
    known = Keys(path)
    assert ADA not in repr(known) + repr(vars(known)) + str(known)


def medians(known, one, other, calls):
    """Of the seconds that each takes, called in turn."""
    taken = {one: [], other: []}
    for turn in range(calls):
        for given in (one, other) if turn % 2 else (other, one):
            start = time.perf_counter_ns()
            known.owner(given)
            taken[given].append(time.perf_counter_ns() - start)
    return statistics.median(taken[one]), statistics.median(taken[other])


def are_alike(known, one, other, calls, share):
    """Whether medians differ by less than ``share``. A machine has bad moments; a leak has none that are good."""
    for _ in range(10):
        first, second = medians(known, one, other, calls)
        if abs(first - second) < share * min(first, second):
            return True
    return False


@pytest.mark.slow
def test_the_time_says_not_how_much_of_a_key_is_right(path):
    key = "k" * (1 << 16)  # comparing so much takes longer than calling
    path.write_text(key)
    assert are_alike(Keys(path), "x" + key[1:], key[:-1] + "x", calls=500, share=0.05)


@pytest.mark.slow
def test_the_time_says_not_which_key_is_right(path):
    many = [f"key-{number:020d}" for number in range(500)]
    path.write_text("\n".join(many))
    assert are_alike(Keys(path), many[0], many[-1], calls=200, share=0.2)
