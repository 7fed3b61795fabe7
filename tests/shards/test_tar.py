"""Tars as people and attackers write them: all of it is read, copied byte for byte, or named in a line."""

import io
import pickle
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from caption_train.data.images import estimate_megapixels
from caption_train.features.opening import Opening
from caption_train.packed import PackedFile
from caption_train.shards.members import DamagedTar, walk_tar
from caption_train.shards.records import NewCaption
from caption_train.shards.tar import TarReader
from tests.fixtures.shards import make_image, read_tar, write_tar

ODD = [
    "/etc/a.png",
    "../../b.png",
    "./c.png",
    "d d/ü.png",
    "e.seg.png",
    "f/" * 60 + "long.png",
    "g.JPG",
    "h\n.png",
]


def write_odd(path, format):
    """A tar with what tars can have: folders, links, odd and long names, numbers of all kinds."""
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("d d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(ODD):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 6, 1_700_000_000.5 if format == tarfile.PAX_FORMAT else 1_700_000_000
            info.uid = 10_000_000_000 if format != tarfile.USTAR_FORMAT else 5
            tar.addfile(info, io.BytesIO(f"png {number:02}".encode()))
            link = tarfile.TarInfo(f"link{number}.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return path


def read(path):
    reader = TarReader(path)
    return list(reader.records()), reader


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_kind_of_header_is_walked_as_tarfile_does(tmp_path, format):
    path = write_odd(tmp_path / "a.tar", format)
    with path.open("rb") as file, tarfile.open(path) as tar:
        found = [(m.name, m.data, m.size, m.is_file) for m in walk_tar(file)]
        assert found == [(m.name, m.offset_data, m.size, m.isreg()) for m in tar]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_odd_names_stay_inside_of_the_shard_and_a_copy_keeps_them(tmp_path, format):
    path = write_odd(tmp_path / "a.tar", format)
    records, _ = read(path)
    assert len(records) == len(ODD)
    assert all(str(record.image).startswith(f"{path}/") for record in records)
    assert [record.image.read_bytes() for record in records] == [f"png {n:02}".encode() for n in range(8)]
    assert records[0].image == path / "etc/a.png" and records[1].image == path / "b.png"
    with (tmp_path / "b.tar").open("wb") as file:
        TarReader(path).write(file, iter([NewCaption(0, "zero"), NewCaption(5, "fünf")]), ".txt")
    with tarfile.open(path) as one, tarfile.open(tmp_path / "b.tar") as other:
        old, new = list(one), {member.name: member for member in other}
        assert [m.name for m in other if m.name not in one.getnames()] == [
            "/etc/a.txt",
            "f/" * 60 + "long.txt",
        ]
        for member in old:
            copy = new[member.name]
            assert (copy.size, copy.mtime, copy.uid, copy.type) == (
                *(member.size, member.mtime, member.uid, member.type),
            )
        assert other.extractfile(new["f/" * 60 + "long.txt"]).read() == "fünf\n".encode()


def test_a_copy_without_new_captions_has_the_bytes_of_the_tar(tmp_path):
    path = write_odd(tmp_path / "a.tar", tarfile.PAX_FORMAT)
    with (tmp_path / "b.tar").open("wb") as file:
        TarReader(path).write(file, iter([]), ".txt")
    assert (tmp_path / "b.tar").read_bytes() == path.read_bytes()


def test_samples_are_told_apart_by_their_key_and_images_with_dots_by_their_stem(tmp_path):
    image = make_image(1)
    members = [("1.5.png", image), ("1.5.txt", "one"), ("1.6.png", image), ("2.left.png", image)]
    members += [("2.right.png", image), ("2.txt", "both"), ("3.png", image), ("3.png.txt", "full")]
    members += [("3.txt", "stem"), ("4.png", image), ("4.jpg", image), ("4.caption", "four"), ("5.txt", "\n")]
    members += [("5.webp", image), ("README", "x")]
    records, _ = read(write_tar(tmp_path / "a.tar", members))
    assert [(record.key, record.caption) for record in records] == [
        *(("1.5", "one"), ("1.6", None), ("2.left", None), ("2.right", None)),
        *(("3", "full"), ("4", "four"), ("5", None)),
    ]


def test_a_key_that_is_there_twice_is_told_and_both_are_captioned(tmp_path):
    members = [("a.png", make_image(1)), ("b.png", make_image(2)), ("a.png", make_image(3))]
    path = write_tar(tmp_path / "a.tar", [*members, ("b.png", b""), ("b.png", b"x")])
    records, reader = read(path)
    assert [record.key for record in records] == ["a", "b", "a", "b"]
    assert reader.notes.lines("a.tar") == ["a.tar: 3 of a name that is there before: a, b.png, b"]
    with (tmp_path / "b.tar").open("wb") as file:
        TarReader(path).write(file, iter([NewCaption(0, "x"), NewCaption(2, "y")]), ".txt")
    assert [m for m in read_tar(tmp_path / "b.tar") if m[0] == "a.txt"] == [
        ("a.txt", b"x\n"),
        ("a.txt", b"y\n"),
    ]


def test_absurd_sizes_are_refused_without_reading_them(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"x" * 100), ("a.txt", b"y")])
    records, _ = read(path)
    huge = PackedFile(path, "a.png", TarReader(path).container, 512, 1 << 31)
    with pytest.raises(ValueError, match="2,147 MB, more than any image has"):
        huge.read_bytes()
    data = bytearray(path.read_bytes())
    data[124:136] = b"77777777777\0"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    path.write_bytes(data)
    records, reader = read(path)
    assert records == [] and "a.tar: cut off inside of a.png" in reader.notes.problems[0]
    path.write_bytes(bytes(data[:124]) + b"\xff" * 12 + bytes(data[136:]))
    assert "damaged at byte 0" in read(path)[1].notes.problems[0]


def test_random_damage_is_lines_and_never_another_error(tmp_path):
    path = write_odd(tmp_path / "a.tar", tarfile.PAX_FORMAT)
    whole, random_ = path.read_bytes(), random.Random(0)
    said = 0
    for _ in range(150):
        data = bytearray(whole[: random_.randrange(1, len(whole))] if random_.random() < 0.3 else whole)
        for _ in range(random_.choice([0, 1, 8, 100])):
            data[random_.randrange(len(data))] = random_.choice([0, 32, 48, 55, 57, 120, 255])
        path.write_bytes(data)
        records, reader = read(path)
        said += len(reader.notes.problems)
        for record in records:
            record.image is None or record.image.read_bytes()
        with (tmp_path / "b.tar").open("wb") as file:
            TarReader(path).write(file, iter([NewCaption(0, "x")]), ".txt")
    assert said > 40


def test_the_sizes_of_images_in_tars_are_measured(tmp_path):
    members = [(f"{n}.png", make_image(n, (1000, 500))) for n in range(3)]
    records, _ = read(write_tar(tmp_path / "a.tar", members))
    assert estimate_megapixels([record.image for record in records]) == 0.5
    opening = SimpleNamespace(
        digests={record.image: record.key for record in records},
        family=SimpleNamespace(features_vary=True, weigh_image=lambda processor, size: size[0] * size[1]),
        processor=None,
    )
    assert Opening._weigh_images(opening) == 1000 * 500 / 32**2


def test_an_image_that_is_sent_elsewhere_is_found_there_by_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_tar(tmp_path / "a.tar", [("x/b.png", make_image(1))]).parent)
    (near,), _ = read(Path("a.tar"))
    copy = TarReader(tmp_path / "a.tar", "s3://bucket/a.tar")
    (far,) = copy.records()
    for image, content in ((near.image.detach(), None), (far.image.detach(), make_image(1))):
        sent = pickle.loads(pickle.dumps(image))
        monkeypatch.chdir("/")
        assert sent.read_bytes() == make_image(1) and sent._content == content
        assert (str(sent), sent.name) == (str(near.image if content is None else far.image), "b.png")
    assert sent.detach() is sent


def test_a_header_of_gigabytes_is_damage(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with (
        (tmp_path / "a.tar").open("rb") as file,
        pytest.raises(DamagedTar, match="a header of 1,073,741,824 bytes"),
    ):
        list(walk_tar(file))
