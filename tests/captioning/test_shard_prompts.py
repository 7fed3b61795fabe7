"""What images in shards are asked: several prompts, rows of a table, what records say themselves."""

import json

import pytest

from caption_train.errors import UsageError
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.shard_runs import captions, make_shards, run, run_and_die
from tests.fixtures.shards import make_image, read_tar, write_parquet, write_tar


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path)


NAMED = ["short=tell", "text=say", "long=all of {name}: {caption}"]


def test_named_prompts_go_to_members_of_their_names_and_what_is_there_is_kept(folder, capsys):
    members = [
        ("a.png", make_image(0)),
        ("a.long.txt", "by hand"),
        ("b.x.png", make_image(6)),
        ("b.txt", "b"),
    ]
    write_tar(folder / "in/00001.tar", [*members, ("c.png", b"damaged"), ("d.jxl", b"")])
    family = FakeFamily()
    assert run(folder, family, prompts=NAMED) == 1
    after = read_tar(folder / "out/00001.tar")
    assert [(name, text) for name, text in after if name.endswith(".txt")] == [
        *(("a.long.txt", b"by hand"), ("a.short.txt", b"tell dark\n"), ("a.txt", b"say dark\n")),
        *(("b.txt", b"b"), ("b.x.short.txt", b"tell white\n"), ("b.x.long.txt", b"all of b.x: b white\n")),
    ]
    assert len(family.loaded) == 1 and len(captions(folder / "out/00000.tar")) == 3 * 7
    err = capsys.readouterr().err
    # 00003.txt, a.long.txt and b.txt are there; nobody says three times that c.png is damaged.
    assert "24 captions made" in err and "3 kept" in err and "2 images could not be read" in err
    assert run(folder, family, prompts=NAMED) == 1 and len(family.loaded) == 1


def test_a_killed_run_of_named_prompts_goes_on_within_an_image(folder, capsys):
    for name, prompts in (("out", NAMED), ("whole", NAMED), ("other", NAMED[:2])):
        code = (
            run_and_die(folder, prompts=prompts, output_shards=str(folder / name)) if name != "whole" else 9
        )
        assert code == 9
        family = FakeFamily()
        assert run(folder, family, prompts=NAMED, output_shards=str(folder / name)) == 0
        # Numbers of captions depend on the names: the journal of others is of no use.
        assert sum(family.model.batches) == 3 * 14 - 1 - 4 * (name == "out")
        for shard in ("00000.tar", "00001.tar"):
            assert (folder / name / shard).read_bytes() == (folder / "out" / shard).read_bytes()
    assert capsys.readouterr().err.count("captioned anew") == 1


def test_named_captions_are_added_to_and_limited_by_image(folder):
    family = FakeFamily()
    run(folder, family, prompts=NAMED[:2], existing="append", limit=5, batch_size=20)
    assert sum(family.model.batches) == 2 * 5
    run(folder, prompts=NAMED[:2], existing="append")
    said = captions(folder / "out/00000.tar")
    assert (said["00003.txt"], said["00003.short.txt"]) == ("by hand, say grey\n", "tell grey\n")


def test_named_prompts_are_columns_of_rows(folder):
    from pyarrow import parquet

    run(folder, prompts=[NAMED[2], NAMED[0]], output_format="jsonl")
    rows = [json.loads(line) for line in (folder / "out/00000.jsonl").read_text().splitlines()]
    assert rows[3] == {
        "key": "00003", "file_name": "00003.png", "long": "all of 00003: by hand grey",
        "short": "tell grey", "text": "by hand",
    }  # fmt: skip
    run(folder, prompts=[NAMED[0]], output_format="parquet", output_shards=str(folder / "rows"))
    written = parquet.read_table(folder / "rows/00000.parquet").to_pylist()
    assert [(row["short"], row["text"]) for row in written][2:4] == [
        ("tell grey", None),
        ("tell grey", "by hand"),
    ]
    made = [
        {"image": make_image(level), "Caption": text, "id": level} for level, text in ((0, "c"), (6, None))
    ]
    (folder / "rows/in").mkdir()
    write_parquet(folder / "rows/in/a.parquet", made)
    run(folder / "rows", prompts=NAMED)
    (first, second) = parquet.read_table(folder / "rows/out/a.parquet").to_pylist()
    assert first == made[0] | {"short": "tell dark", "long": "all of 000000000: c dark"}
    assert second == made[1] | {
        "Caption": "say white", "short": "tell white", "long": "all of 000000001:  white"
    }  # fmt: skip
    run(folder / "rows", prompts=[NAMED[0]], output_format="webdataset", output_shards=str(folder / "tars"))
    said = captions(folder / "tars/a.tar")
    assert said == {
        "000000000.short.txt": "tell dark\n", "000000000.txt": "c\n", "000000001.short.txt": "tell white\n"
    }  # fmt: skip


def test_a_column_that_holds_something_else_gets_no_captions(folder, capsys):
    write_parquet(folder / "in/a.parquet", [{"image": make_image(0), "id": 1}])
    for options in ({"prompts": ["id=x"]}, {"caption_extension": "id"}, {"prompts": ["image=x"]}):
        family = FakeFamily()
        assert run(folder, family, images=[str(folder / "in/a.parquet")], **options) == 1
        assert "a.parquet: its column i" in (err := capsys.readouterr().err) and "holds no captions" in err
        assert family.loaded == []
    assert run(folder, images=[str(folder / "in/a.parquet")], prompts=["id=x"], output_format="jsonl") == 0


@pytest.mark.parametrize("most", [1, 20_000])
def test_rows_of_a_table_say_what_images_in_shards_are_asked(folder, monkeypatch, most, capsys):
    monkeypatch.setattr("caption_train.captioning.storage.mapping.MOST_IN_MEMORY", most)
    write_tar(folder / "in/00001.tar", [(f"x/{name}.png", make_image(0)) for name in ("00000", "b", "c")])
    rows = [
        ("00000/00000.png", "who", "", ""),  # by the shard's name: not x/00000.png
        ("x/b.png", "where", "", ""),
        ("c.png", "", "c's text", "hat"),
        ("00006.png", "when", "", ""),
        ("00006.png", "twice", "", ""),
        ("00005.png", "", "", "mat"),
    ]
    table = folder / "ask.csv"
    table.write_text("\n".join(map(",".join, [("file_name", "prompt", "text", "tags"), *rows])))
    run(folder, metadata=table)
    said = captions(folder / "out/00000.tar")
    assert [said[f"0000{n}.txt"] for n in (0, 1, 6)] == ["who dark\n", "say dark\n", "when white\n"]
    said = captions(folder / "out/00001.tar")
    assert list(said.values()) == ["say dark\n", "where dark\n", "say dark\n"]
    assert "its column prompt says what 3 images are asked" in capsys.readouterr().err
    places = {"output_shards": str(folder / "more"), "overwrite": True}
    run(folder, metadata=table, prompt_template="{prompt}/{caption}/{tags}", **places)
    said = captions(folder / "more/00000.tar")
    assert [said[f"0000{n}.txt"].split()[0] for n in (0, 5, 6)] == ["who//t0,", "say//mat", "when//t6,"]
    assert said["00003.txt"] == "say/by hand/t3, u grey\n"
    assert captions(folder / "more/00001.tar")["x/c.txt"] == "say/c's text/hat dark\n"


def test_a_table_that_cannot_be_read_is_one_line(folder):
    (folder / "bad.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"--metadata .*bad.jsonl: cannot be read: .*no JSON"):
        run(folder, metadata=folder / "bad.jsonl")


def test_a_record_says_itself_what_it_is_asked_where_the_template_says_so(folder, capsys):
    members = [("a.png", make_image(0)), ("a.json", '{"prompt": "who"}'), ("b.png", make_image(0))]
    write_tar(folder / "in/00000.tar", [*members, ("c.png", make_image(0)), ("c.json", '{"prompt": 3}')])
    write_parquet(
        folder / "in/a.parquet",
        [{"image": make_image(6), "prompt": "where", "tags": ["x", "y"]}, {"image": make_image(6)}],
    )
    for name in ("00000.tar", "a.parquet"):
        images = [str(folder / "in" / name)]
        code = run(folder, images=images, prompt_template="{prompt}|{tags}", output_format="jsonl")
        assert code == int(name == "00000.tar")
        run(folder, images=images, output_shards=str(folder / "plain"), output_format="jsonl")
    texts = {
        place: [json.loads(line)["text"] for line in (folder / f"{place}.jsonl").read_text().splitlines()]
        for place in ("out/00000", "out/a", "plain/00000", "plain/a")
    }
    assert texts == {
        "out/00000": ["who| dark", "say| dark"],
        "out/a": ["where|x, y white", "say| white"],
        "plain/00000": ["say dark"] * 3,
        "plain/a": ["say white"] * 2,
    }
    assert "in/00000.tar/c: prompt in its row is not a string" in capsys.readouterr().err


def test_an_answer_is_read_as_that_of_the_prompt_that_its_image_was_asked(folder):
    class Answers(FakeFamily):
        def parse_answer(self, text, prompt, size):
            return {"asked": prompt}

    run(folder, Answers(), prompt_template="{name}?", output_format="jsonl")
    rows = [json.loads(line) for line in (folder / "out/00000.jsonl").read_text().splitlines()]
    assert rows[2]["answer"] == {"asked": "00002?"} and "answer" not in rows[3]


def test_nothing_is_made_of_a_caption_that_cannot_be_read(folder, capsys):
    write_tar(folder / "in/00000.tar", [("a.png", make_image(0)), ("a.txt", b"\xff\xfe\x00")])
    assert run(folder, prompt_template="Correct: {caption}", overwrite=True) == 1
    assert "in/00000.tar/a: its caption cannot be read" in capsys.readouterr().err
    assert read_tar(folder / "out/00000.tar")[1] == ("a.txt", b"\xff\xfe\x00")
    prompts = ["short={caption} s", "long={caption} l"]
    assert run(folder, prompts=prompts, output_shards=str(folder / "named")) == 1
    err = capsys.readouterr().err
    assert err.count("its caption cannot be read") == 1 and "1 image could not be read" in err


@pytest.mark.parametrize(
    ("column", "prompts", "options"),
    [
        ("caption", ["text=say", "Caption=tell"], {"overwrite": True}),
        ("text", ["text=say", "long=tell"], {"caption_extension": "long"}),
        ("long", ["long=say", "Long=tell"], {"overwrite": True}),
    ],
)
def test_two_captions_of_an_image_are_never_put_into_one_column(tmp_path, capsys, column, prompts, options):
    (tmp_path / "in").mkdir()
    rows = [{"image": {"bytes": make_image(0), "path": "a.png"}, column: "by hand"}]
    write_parquet(tmp_path / "in/0.parquet", rows)
    assert run(tmp_path, prompts=prompts, **options) == 1
    assert "two captions of an image would be in its column" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))
