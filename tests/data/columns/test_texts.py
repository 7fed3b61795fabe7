"""Strings in one buffer are the strings that were put in."""

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from caption_train.data.columns.texts import Texts

STRINGS = st.lists(st.text() | st.sampled_from(["", "\udcff", "\ud83d", "ü", "a\0b"]), max_size=30)


@given(strings=STRINGS, more=STRINGS, data=st.data())
def test_strings_come_back_by_row_in_any_order_and_joined(strings, more, data):
    texts = Texts.of(strings)
    assert len(texts) == len(strings) and [texts[row] for row in range(len(texts))] == strings
    both = Texts.join([texts, Texts.of(more)])
    every = strings + more
    rows = data.draw(st.lists(st.integers(0, len(every) - 1), max_size=40)) if every else []
    rows = np.array(rows, np.int64)
    assert list(both.select(rows)) == list(
        pickle.loads(pickle.dumps(both)).take(rows).select(range(len(rows)))
    )
    assert list(both.select(rows)) == [every[row] for row in rows]
    lengths = [len(every[row].encode("utf-8", "surrogatepass")) for row in rows]
    assert both.lengths(rows).tolist() == lengths


def test_parts_of_many_rows_are_put_together_as_one(monkeypatch):
    monkeypatch.setattr("caption_train.data.columns.texts._AT_ONCE", 3)
    texts = Texts.of(str(number) * number for number in range(10))
    rows = np.array([9, 0, 3, 3, 8, 1, 2, 7])
    assert list(texts.take(rows).select(range(8))) == list(texts.select(rows)) == [texts[row] for row in rows]
