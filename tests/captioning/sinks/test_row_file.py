"""The file of captions keeps what others have in it, to the byte."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_train.captioning.outputs import Caption
from caption_train.captioning.sinks.caption_file import CaptionFile
from caption_train.captioning.sinks.row_file import RowFile
from caption_train.errors import UsageError


def test_a_name_that_no_row_can_hold_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\\udcff\.png has a name that is not UTF-8"):
        RowFile(tmp_path / "captions.csv").name_of(tmp_path / os.fsdecode(b"\xff.png"))


def test_a_dataset_cannot_reach_outside_its_folder(tmp_path):
    (tmp_path / "data").mkdir()
    file = CaptionFile(tmp_path / "data" / "metadata.jsonl")
    with pytest.raises(UsageError, match="cannot reach outside"):
        file.rows.name_of(tmp_path / "a.png")
    assert RowFile(tmp_path / "data" / "c.jsonl").name_of(tmp_path / "a.png") == str(tmp_path / "a.png")


@pytest.mark.parametrize("data", [b"no json\n", b'["a"]\n', b'{"image": "a.png"}\n', b"\xff\xfe"])
def test_a_file_that_cannot_be_continued_is_refused_untouched(tmp_path, data):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"captions\.jsonl"):
        CaptionFile(path).captions()
    assert path.read_bytes() == data


def test_rows_of_others_are_the_same_bytes_after_a_run(tmp_path):
    path = tmp_path / "metadata.jsonl"
    others = (
        b'\xef\xbb\xbf{"file_name":"z.png" ,"text":"\\ud83d half", "score": 1.10, "score": 2e0}\r\n'
        b'\n{"file_name": "y.png", "id": 12345678901234567890123, "caf\\u00e9": "\xc3\xa9"}'
    )
    path.write_bytes(others)
    file = CaptionFile(path)
    file.write(Caption(tmp_path / "a.png", "new"))
    file.finish([tmp_path / "a.png"])
    assert path.read_bytes() == others + b'\n{"file_name": "a.png", "text": "new"}\n'


def test_a_row_that_gets_a_caption_keeps_all_else_in_it(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(
        '{ "score": 1.10, "file_name": "a.png", "n": {"text": 1.0}, "odd": "\\ud83d", "odd": 2 }\n'
    )
    file = CaptionFile(path)
    file.write(Caption(tmp_path / "a.png", "new", answer={"labels": ["é"]}))
    file.finish([tmp_path / "a.png"])
    assert path.read_text() == (
        '{"score": 1.10, "file_name": "a.png", "n": {"text": 1.0}, "odd": "\\ud83d", "odd": 2, '
        '"text": "new", "answer": {"labels": ["é"]}}\n'
    )


def test_cells_beyond_the_header_stay_beyond_it(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(b'file_name,text\nz.png,"old, ""quoted""",extra,1.10\n\ny.png\n"x\n.png",b,c\n')
    file = CaptionFile(path)
    file.write(Caption(tmp_path / "y.png", "new"))
    file.write(Caption(tmp_path / "a.png", "new", remarks=["cut"]))
    file.finish([tmp_path / "y.png", tmp_path / "a.png"])
    assert path.read_bytes() == (
        b'file_name,text,,,remarks\nz.png,"old, ""quoted""",extra,1.10\n"x\n.png",b,c\n'
        b'y.png,new,,,\na.png,new,,,"[""cut""]"\n'
    )


NUMBERS = st.sampled_from(["1.10", "-0", "1e400", "12345678901234567890", "0.1000", "NaN", "true", "null"])
STRINGS = st.sampled_from(['"\\ud83d"', '"\\u00e9"', '"é"', '"a\\/b"', '""', '"}\\"{"', '"\u2028"', '"\x85"'])
VALUES = st.recursive(
    NUMBERS | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=2).map(lambda v: "[" + " ,".join(v) + "]")
        | inner.map(lambda v: '{"text": ' + v + ', "text":' + v + "}")
    ),
    max_leaves=4,
)
NAMES = st.sampled_from(["n", "n", "text", "caption", "remarks", "\\u0074ext", "é", "", "file_name2"])
SPACES = st.sampled_from(["", " ", "\t", "  "])


@st.composite
def odd_rows(draw):
    """Draw (lines of a .jsonl file as somebody might have written them, how many), z0.png and on."""
    lines = []
    for number in range(draw(st.integers(0, 4))):
        members = [f'"file_name"{draw(SPACES)}: "z{number}.png"']
        for _ in range(draw(st.integers(0, 4))):
            members.append(f'"{draw(NAMES)}":{draw(SPACES)}{draw(VALUES)}{draw(SPACES)}')
        draw(st.randoms()).shuffle(members)
        blank = draw(st.sampled_from(["", "", "\n", " \r\n"]))
        lines.append(
            blank + draw(SPACES) + "{" + ",".join(members) + "}" + draw(st.sampled_from(["\n", "\r\n"]))
        )
    return lines


@settings(max_examples=200)
@given(lines=odd_rows(), mark=st.sampled_from(["", "\ufeff"]), changed=st.integers(0, 3))
def test_odd_rows_pass_through_and_changed_ones_keep_their_other_members(
    tmp_path_factory, lines, mark, changed
):
    path = tmp_path_factory.mktemp("odd") / "captions.jsonl"
    path.write_bytes((mark + "".join(lines)).encode())
    had = CaptionFile(path).captions()
    file = CaptionFile(path)
    file.write(Caption(path.parent / "a.png", "new"))
    file.write(Caption(path.parent / f"z{changed}.png", "changed"))
    kept = file.finish()
    text = path.read_bytes().decode()
    assert text.startswith(mark) and '{"file_name": "a.png", "text": "new"}\n' in text
    for number, line in enumerate(lines):
        if number != changed or f"z{number}.png" in had:
            assert line in text
    name = f"z{changed}.png"
    assert CaptionFile(path).captions() == had | {"a.png": "new", name: had.get(name, "changed")}
    assert kept == ([name] if had.get(name, "changed") != "changed" else [])


CELLS = st.sampled_from(
    ["", "a", "1.10", '"q"', '"a, ""b"""', '"two\nlines"', '"two\r\nlines"', " space ", "é", "\u2028"]
)


@settings(max_examples=200)
@given(
    rows=st.lists(st.lists(CELLS, max_size=5), max_size=4),
    columns=st.lists(st.sampled_from(["text", "caption", "n", "answer", "", "n"]), max_size=3),
    end=st.sampled_from(["\n", "\r\n"]),
    blank=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
    changed=st.integers(0, 3),
)
def test_odd_tables_pass_through(tmp_path_factory, rows, columns, end, blank, mark, changed):
    path = tmp_path_factory.mktemp("odd") / "captions.csv"
    lines = [",".join([f"z{number}.png", *cells]) + end for number, cells in enumerate(rows)]
    header = ",".join(["file_name", *columns]) + end
    path.write_bytes((mark + header + (end if blank else "").join(["", *lines])).encode())
    had = CaptionFile(path).captions()
    file = CaptionFile(path)
    file.write(Caption(path.parent / "a.png", "new", remarks=["cut"]))
    file.write(Caption(path.parent / f"z{changed}.png", "changed"))
    file.finish()
    text, name = path.read_bytes().decode(), f"z{changed}.png"
    assert text.startswith(mark + "file_name")
    for number, line in enumerate(lines):
        if number != changed or name in had:
            assert line in text
    assert CaptionFile(path).captions() == had | {"a.png": "new", name: had.get(name, "changed")}
