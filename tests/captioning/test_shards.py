"""Captioning shards on a family without a model: what is captioned, kept, resumed, refused and written."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from caption_train.captioning.job import caption_folder
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.shards.output import OutputFolder
from caption_train.shards.places import find_shards
from caption_train.shards.records import NewCaption
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.shard_runs import captions, listing, make_shards, run, run_and_die
from tests.fixtures.shards import make_image, read_tar, write_parquet, write_shard, write_tar


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path)


def test_a_shard_gets_captions_and_keeps_all_else_byte_for_byte(folder, capsys):
    assert run(folder) == 0
    before, after = read_tar(folder / "in/00000.tar"), read_tar(folder / "out/00000.tar")
    assert [m for m in after if not m[0].endswith(".txt")] == [m for m in before if not m[0].endswith(".txt")]
    said = captions(folder / "out/00000.tar")
    assert said["00000.txt"] == "say dark\n" and said["00003.txt"] == "by hand\n"
    assert len(said) == 7 and len(captions(folder / "out/00001.tar")) == 7
    assert [name for name, _ in after][:3] == ["00000.png", "00000.json", "00000.txt"]
    err = capsys.readouterr().err
    assert "13 images captioned" in err and "1 kept" in err and "2 shards written" in err


def test_a_new_caption_file_has_the_owner_and_the_time_of_its_image(folder):
    run(folder)
    with tarfile.open(folder / "out/00001.tar") as tar:
        member = tar.getmember("00008.txt")
        assert (member.uname, member.mtime) == ("bigdata", 1_700_000_000)


def test_captions_are_those_of_the_same_images_as_files(folder, tmp_path):
    (tmp_path / "files").mkdir()
    for shard in ("00000", "00001"):
        for name, content in read_tar(folder / f"in/{shard}.tar"):
            if name.endswith(".png"):
                (tmp_path / "files" / name).write_bytes(content)
    plain, packed = FakeFamily(), FakeFamily()
    settings = {"num_workers": 0, "batch_size": 3, "temperature": 1.0, "seed": 3}
    caption_folder(CaptionOptions(images=[str(tmp_path / "files")], save_captions=True, **settings), plain)
    run(folder, packed, existing="overwrite", **settings)
    files = {path.name: path.read_text() for path in (tmp_path / "files").glob("*.txt")}
    assert files == captions(folder / "out/00000.tar") | captions(folder / "out/00001.tar")
    assert plain.model.batches == packed.model.batches == [3, 3, 3, 3, 2]


def test_a_killed_run_goes_on_and_writes_the_bytes_of_an_unbroken_one(folder, capsys):
    assert run_and_die(folder, output_shards=str(folder / "broken")) == 9
    assert listing(folder / "broken") == [".00000.tar.lock", ".00000.tar.part"]
    family = FakeFamily()
    assert run(folder, family, output_shards=str(folder / "broken")) == 0
    assert sum(family.model.batches) == 13 - 4
    assert "5 kept" in capsys.readouterr().err
    run(folder)
    assert listing(folder / "broken") == listing(folder / "out")
    for name in listing(folder / "out"):
        assert (folder / "broken" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_a_shard_is_replaced_by_one_prompt_alone_though_the_first_run_was_killed(folder, capsys):
    assert run_and_die(folder, overwrite=True, prompt="first") == 9
    assert run(folder, overwrite=True, prompt="second") == 0
    assert "it is captioned anew" in capsys.readouterr().err
    run(folder, output_shards=str(folder / "unbroken"), overwrite=True, prompt="second")
    assert (folder / "out/00000.tar").read_bytes() == (folder / "unbroken/00000.tar").read_bytes()


def test_half_a_line_of_a_journal_is_captioned_again(folder):
    assert run_and_die(folder) == 9
    journal = folder / "out/.00000.tar.part"
    journal.write_bytes(journal.read_bytes()[:-5])
    family = FakeFamily()
    assert run(folder, family) == 0
    assert sum(family.model.batches) == 13 - 3
    assert len(captions(folder / "out/00000.tar")) == 7


def test_a_kill_between_the_shard_and_its_record_writes_the_same_shard_again(folder, monkeypatch):
    run(folder, output_shards=str(folder / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr("caption_train.shards.output.write_atomically", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder)
    assert listing(folder / "out") == [".00000.tar.part", "00000.tar"]
    family = FakeFamily()
    assert run(folder, family) == 0
    assert sum(family.model.batches) == 7
    assert (folder / "out/00000.tar").read_bytes() == (folder / "whole/00000.tar").read_bytes()


def test_what_is_remembered_of_a_deleted_shard_is_not_taken_for_its_successor(folder, monkeypatch, capsys):
    run(folder)
    (folder / "out/00000.tar").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("caption_train.shards.output.write_atomically", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, prompt="what")
    assert ".00000.tar.part" in listing(folder / "out") and ".00000.tar.done" not in listing(folder / "out")
    run(folder, prompt="what")
    assert captions(folder / "out/00000.tar")["00000.txt"] == "what dark\n"
    assert "1 shard done before with another model, prompt or other flags" in capsys.readouterr().err


def test_errors_at_the_end_of_a_journal_are_tried_again(folder):
    """A server that answers no more, or a disk that is gone, must not leave images without a caption."""
    shard = find_shards([str(folder / "in")], "--images")[0]
    (folder / "out").mkdir()
    journal = OutputFolder(str(folder / "out")).journal(shard)
    facts = {"stamp": shard.stamp}
    assert journal.resume(facts) is False
    for index, text in enumerate(("a", None, "b", None, None)):
        journal.add(NewCaption(index, text, None if text else "no answer"))
    journal.close()
    again = OutputFolder(str(folder / "out")).journal(shard)
    assert again.resume(facts) is False and again.last == 2
    again.add(NewCaption(3, "c"))
    assert [(row.index, row.text) for row in again.read()] == [(0, "a"), (1, None), (2, "b"), (3, "c")]
    again.close()


def test_done_shards_are_skipped_and_nothing_is_loaded(folder, capsys):
    run(folder)
    (folder / "out/00001.tar").unlink()
    family = FakeFamily()
    run(folder, family)
    assert sum(family.model.batches) == 7
    family = FakeFamily()
    assert run(folder, family) == 0
    assert family.loaded == []
    assert "2 done before" in capsys.readouterr().err


def test_a_shard_that_has_changed_since_is_told_and_left(folder, capsys):
    run(folder)
    was = (folder / "out/00001.tar").read_bytes()
    write_shard(folder / "in/00001.tar", levels=[1, 2])
    assert run(folder) == 1
    assert "00001.tar: has changed since it was captioned: delete 00001.tar in" in capsys.readouterr().err
    assert (folder / "out/00001.tar").read_bytes() == was


def test_a_shard_that_changes_before_a_killed_run_goes_on_is_captioned_anew(folder, capsys):
    assert run_and_die(folder) == 9
    write_shard(folder / "in/00000.tar", levels=[6, 6, 6, 6])
    family = FakeFamily()
    assert run(folder, family) == 0
    assert set(captions(folder / "out/00000.tar").values()) == {"say white\n"}
    assert "captioned anew" in capsys.readouterr().err


def test_what_another_program_wrote_there_is_not_replaced(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/00000.tar").write_text("mine")
    assert run(folder) == 1
    assert (folder / "out/00000.tar").read_text() == "mine"
    assert "00000.tar is there, and not from this command: move it away" in capsys.readouterr().err
    assert len(captions(folder / "out/00001.tar")) == 7


def test_other_settings_leave_done_shards_and_say_so(folder, capsys):
    run(folder)
    run(folder, prompt="what")
    assert "2 shards done before with another model, prompt or other flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("existing", "said"),
    [("overwrite", "say grey\n"), ("append", "by hand, say grey\n"), ("prepend", "say grey, by hand\n")],
)
def test_old_captions_are_replaced_or_added_to_in_their_place(folder, existing, said):
    run(folder, existing=existing)
    names = [name for name, _ in read_tar(folder / "out/00000.tar")]
    assert names.count("00003.txt") == 1
    assert names.index("00003.txt") == names.index("00003.json") + 1
    assert captions(folder / "out/00000.tar")["00003.txt"] == said


def test_a_run_that_adds_and_is_killed_adds_once(folder):
    assert run_and_die(folder, existing="append") == 9
    run(folder, existing="append")
    assert captions(folder / "out/00000.tar")["00003.txt"] == "by hand, say grey\n"


def test_limit_leaves_the_rest_to_the_next_run(folder):
    family = FakeFamily()
    run(folder, family, limit=9)
    assert sum(family.model.batches) == 9
    assert listing(folder / "out") == [".00000.tar.done", ".00001.tar.part", "00000.tar"]
    family = FakeFamily()
    run(folder, family)
    assert sum(family.model.batches) == 4


def test_unreadable_images_are_named_and_the_rest_captioned(folder, capsys):
    members = [("a.png", make_image(0)), ("b.png", b"no image"), ("c.png", b""), ("d.png", make_image(6))]
    members += [("e.jxl", b"x"), ("f.txt", "no image"), ("sub/.g.png", b"hidden")]
    write_tar(folder / "in/00001.tar", members)
    assert run(folder) == 1
    err = capsys.readouterr().err
    assert "in/00001.tar/b.png: not an image" in err and "in/00001.tar/c.png: empty (0 bytes)" in err
    assert "in/00001.tar/e.jxl: .jxl files are not read" in err
    assert "in/00001.tar: 1 without an image: f" in err
    assert "3 images could not be read" in err
    after = read_tar(folder / "out/00001.tar")
    assert [m for m in after if m[0] not in ("a.txt", "d.txt")] == members[:5] + [
        ("f.txt", b"no image"),
        ("sub/.g.png", b"hidden"),
    ]


def test_what_could_not_be_read_is_told_again_with_how_to_try_again(folder, capsys):
    write_tar(folder / "in/00000.tar", [("a.png", make_image(1)), ("b.png", b"damaged")])
    assert run(folder) == 1
    capsys.readouterr()
    assert run(folder) == 1
    said = capsys.readouterr().err
    assert "1 image could not be read when it was captioned: delete 00000.tar in" in said


def test_a_name_that_is_not_utf8_is_escaped_in_rows(folder):
    write_tar(folder / "in/00000.tar", [("caf\udce9.png", make_image(1))])
    assert run(folder, output_format="jsonl") == 0
    (row,) = map(json.loads, (folder / "out/00000.jsonl").read_text().splitlines())
    assert row["key"] == "caf\udce9"


def test_rows_without_images_are_written_on_request(folder):
    run(folder, output_format="jsonl")
    rows = [json.loads(line) for line in (folder / "out/00000.jsonl").read_text().splitlines()]
    assert rows[0] == {"key": "00000", "file_name": "00000.png", "text": "say dark"}
    assert rows[3]["text"] == "by hand" and len(rows) == 7
    run(folder, output_format="parquet", output_shards=str(folder / "rows"))
    from pyarrow import parquet

    assert parquet.read_table(folder / "rows/00000.parquet").to_pylist() == rows


def test_parquet_gets_a_caption_column_and_keeps_all_else(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "in").mkdir()
    rows = [
        {"image": {"bytes": make_image(level), "path": f"{level}.png"}, "id": level} for level in range(7)
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {
        "info": {"features": {"image": {"_type": "Image"}, "id": {"dtype": "int64", "_type": "Value"}}}
    }
    schema = pyarrow.schema([("image", kind), ("id", pyarrow.int64())], {"huggingface": json.dumps(features)})
    write_parquet(tmp_path / "in/a.parquet", rows, schema)
    assert run(tmp_path) == 0
    from datasets import load_dataset

    written = parquet.read_table(tmp_path / "out/a.parquet").to_pylist()
    assert [{key: row[key] for key in ("image", "id")} for row in written] == rows
    assert [row["text"] for row in written][:3] == ["say dark", "say dark", "say grey"]
    loaded = load_dataset(
        "parquet", data_files=str(tmp_path / "out/a.parquet"), split="train", cache_dir=tmp_path / "cache"
    )
    assert loaded[6]["text"] == "say white" and loaded[6]["image"].size == (8, 6)
    run(tmp_path, output_format="webdataset", output_shards=str(tmp_path / "tars"))
    assert read_tar(tmp_path / "tars/a.tar")[:2] == [
        ("000000000.png", make_image(0)),
        ("000000000.txt", b"say dark\n"),
    ]


def test_a_second_run_on_what_was_written_adds_a_second_caption(folder):
    write_parquet(folder / "in/a.parquet", [{"image": make_image(level)} for level in (0, 6)])
    for name, extension in (("00000.tar", ".long.txt"), ("a.parquet", "long")):
        run(folder, images=[str(folder / "in" / name)])
        more = {"output_shards": str(folder / "both"), "caption_extension": extension}
        run(folder, images=[str(folder / "out" / name)], prompt="what", **more)
    said = captions(folder / "both/00000.tar")
    assert (said["00000.txt"], said["00000.long.txt"]) == ("say dark\n", "what dark\n")
    assert (said["00003.txt"], said["00003.long.txt"]) == ("by hand\n", "what grey\n")
    from pyarrow import parquet

    rows = parquet.read_table(folder / "both/a.parquet").to_pylist()
    assert [(row["text"], row["long"]) for row in rows] == [
        ("say dark", "what dark"),
        ("say white", "what white"),
    ]


def test_a_template_reads_caption_tags_name_and_folder_of_each_record(folder):
    run(folder, prompt_template="{folder}/{name} {tags} {caption}", existing="overwrite")
    said = captions(folder / "out/00000.tar")
    assert said["00003.txt"] == "00000/00003 t3, u by hand grey\n"
    assert said["00004.txt"] == "00000/00004 t4, u  bright\n"


def test_two_runs_at_once_share_the_shards(folder, capsys):
    output = OutputFolder(str(folder / "out"))
    shard = find_shards([str(folder / "in")], "--images")[0]
    (folder / "out").mkdir()
    lock = output.lock(shard)
    process = os.fork()
    if not process:
        lock.acquire()
        os.kill(os.getpid(), 19)  # stopped, as a run that is at work
        os._exit(0)
    try:
        os.waitpid(process, os.WUNTRACED)
        assert run(folder) == 0
        err = capsys.readouterr().err
        assert "1 being captioned by other runs" in err
        assert "1 shard of 2 still missing: 00000.tar" in err
        assert len(captions(folder / "out/00001.tar")) == 7
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
    assert run(folder) == 0
    assert len(captions(folder / "out/00000.tar")) == 7


def test_shards_in_a_bucket_are_read_and_written_through_fsspec(folder, capsys):
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(folder / "in"), "/bucket/", recursive=True)
        places = {"images": ["memory://bucket/in/{00000..00001}.tar"], "output_shards": "memory://bucket/out"}
        assert run(folder, **places) == 0
        run(folder)
        for name in ("00000.tar", "00001.tar"):
            assert memory.cat_file(f"/bucket/out/{name}") == (folder / "out" / name).read_bytes()
        family = FakeFamily()
        assert run(folder, family, **places) == 0
        assert family.loaded == [] and "2 done before" in capsys.readouterr().err
        memory.pipe_file("/bucket/in/00001.tar", b"changed")
        assert run(folder, **places) == 1
        assert "memory://bucket/in/00001.tar: has changed" in capsys.readouterr().err
    finally:
        memory.rm("/bucket", recursive=True)


def test_jobs_of_a_scheduler_divide_the_shards(folder):
    assert run(folder, shard="2/2") == 0
    assert listing(folder / "out") == [".00001.tar.done", "00001.tar"]
    assert run(folder, shard="1/2") == 0
    assert {"00000.tar", "00001.tar"} < set(listing(folder / "out"))


def test_workers_read_images_inside_of_shards(folder):
    run(folder, num_workers=2)
    run(folder, output_shards=str(folder / "alone"))
    assert (folder / "out/00001.tar").read_bytes() == (folder / "alone/00001.tar").read_bytes()


def test_too_little_memory_halves_the_batch_and_captions_all(folder):
    class Small(FakeFamily):
        def generate(self, model, processor, batch, **settings):
            if len(batch["pixel_values"]) > 1:
                raise MemoryError
            return super().generate(model, processor, batch, **settings)

    run(folder, Small(), batch_size=4)
    run(folder, output_shards=str(folder / "large"))
    for name in ("00000.tar", "00001.tar"):
        assert (folder / "out" / name).read_bytes() == (folder / "large" / name).read_bytes()


def test_what_cannot_work_is_refused_before_a_model_is_loaded(folder, tmp_path):
    for options, said in (
        ({"output_shards": None}, "these are shards: say with --output_shards"),
        ({"output_shards": str(folder / "in")}, "holds the shards themselves"),
        ({"images": [str(folder / "nowhere.tar")]}, "there is no such file"),
        ({"images": [str(folder / "in/*.parquet")]}, "no shards there"),
        ({"images": [str(folder / "in"), __file__]}, "is no shard"),
        ({"images": ["nosuch://bucket/a.tar"]}, "nosuch"),
        ({"output_shards": f"{__file__}/out"}, "Not a directory"),
    ):
        family = FakeFamily()
        with pytest.raises(UsageError, match=said):
            run(folder, family, **options)
        assert family.loaded == []
    (folder / "other").mkdir()
    (folder / "other/00000.tar").write_bytes((folder / "in/00000.tar").read_bytes())
    with pytest.raises(UsageError, match="would both be written there by one name"):
        run(folder, images=[str(folder / "in"), str(folder / "other")])


def test_flags_of_files_do_not_go_with_shards():
    given = {"images": ["a.tar"], "output_shards": "out"}
    for name, value in (("save_captions", True), ("recursive", True), ("output", Path("a.csv"))):
        (said,) = CaptionOptions(**given | {name: value}).check()
        assert said.startswith(f"--{name} does not go with --output_shards, which ")
    (said,) = CaptionOptions(**given, prompts=["key=x"]).check()
    assert said.startswith("--prompts key: that column of shards says something else")
    assert CaptionOptions(images=["a"], output_format="jsonl").check() != []


def test_a_full_disk_is_one_line_and_the_captions_wait(folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr("caption_train.shards.output.finish_temporary", full)
        with pytest.raises(CaptionTrainError, match="No space left on device"):
            run(folder)
    assert listing(folder / "out") == [".00000.tar.part"]
    family = FakeFamily()
    assert run(folder, family) == 0
    assert sum(family.model.batches) == 7
