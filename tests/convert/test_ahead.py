"""Reading runs ahead of use, in order, and not further than it may."""

import threading

import pytest

from gshardx.convert.ahead import read_ahead


@pytest.mark.parametrize(("most", "ahead"), [(1, 1), (20, 2), (45, 4), (1000, 9)])
def test_it_is_ahead_by_so_many_bytes(most, ahead):
    read, enough = [], threading.Semaphore(0)

    def reading(number):
        read.append(number)
        enough.release()
        return str(number)

    def making(number, text):
        assert text == str(number)
        return -number

    found = []
    for value in read_ahead(range(9), reading, making, lambda number: 10, most):
        found.append(value)
        for _ in range(ahead if len(found) == 1 else min(1, max(0, 9 - len(found) - ahead + 1))):
            assert enough.acquire(timeout=20), "it reads as far as it may"
        assert len(read) <= min(9, len(found) + ahead - 1)
    assert found == [-number for number in range(9)]
    assert read == list(range(9))


@pytest.mark.parametrize("where", ["read", "make"])
def test_an_error_comes_where_its_value_would(where):
    def failing(number):
        if number == 1:
            raise ValueError("damaged")
        return number

    def same(number):
        return number

    read, make = (failing, same) if where == "read" else (same, failing)
    values = read_ahead(range(5), read, lambda number, _: make(number) and -number, lambda number: 1, 100)
    assert next(values) == 0
    with pytest.raises(ValueError, match="damaged"):
        next(values)
