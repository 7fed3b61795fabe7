"""What was found in image files is kept between runs, is never wrong, and never gets in the way."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from caption_train.data import image_index
from caption_train.data.image_index import ImageIndex, inspect_images
from caption_train.data.images import ImageError, inspect_image


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4 + i, 4), (i, 0, 0)).save(path)
    return paths


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "index.sqlite"


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded, in a list. Every file counts as old enough to be kept."""
    names = []

    def note(path):
        names.append(path.name)
        return inspect_image(path)

    monkeypatch.setattr(image_index, "inspect_image", note)
    monkeypatch.setattr(image_index, "_RACY_NS", -(10**15))
    return names


def look(images, path):
    return inspect_images(images, show_progress=False, index=ImageIndex(path))


def fill(images, path, decoded):
    """Fill the index, forget that images were decoded for it, and return what they are."""
    expected = look(images, path)
    decoded.clear()
    return expected


def test_an_image_is_decoded_once_in_all_runs(images, path, decoded):
    first = look(images, path)
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]
    assert look([images[2], *images], path) == [first[2], *first] == [first[2], *map(inspect_image, images)]
    assert len(decoded) == 4


@pytest.mark.parametrize("change", ["content", "time", "replaced", "link"])
def test_a_changed_file_is_decoded_again(change, images, path, decoded):
    fill(images, path, decoded)
    old = images[1].stat()
    if change == "content":  # of the same length, with its old time of change
        content = images[1].read_bytes()
        images[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(images[1], ns=(old.st_atime_ns, old.st_mtime_ns))
    elif change == "time":
        os.utime(images[1], ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    elif change == "replaced":
        Image.new("RGB", (9, 9)).save(images[1].with_name("new.png"))
        images[1].with_name("new.png").replace(images[1])
    else:
        images[1].unlink()
        images[1].symlink_to(images[3])
    found = look(images, path)
    assert decoded == ["1.png"] and found[1] == inspect_image(images[1])


@pytest.mark.parametrize("name", ["FORMAT", "Pillow"])
def test_another_decoder_decodes_again(name, images, path, decoded, monkeypatch):
    fill(images, path, decoded)
    if name == "FORMAT":
        monkeypatch.setattr(image_index, "FORMAT", image_index.FORMAT + 1)
    else:
        monkeypatch.setattr(image_index.PIL, "__version__", "1000.0")
    image_index._decoders.cache_clear()
    look(images, path)
    image_index._decoders.cache_clear()
    assert len(decoded) == 4


def test_a_file_that_has_just_been_written_is_not_trusted(images, path, decoded, monkeypatch):
    monkeypatch.setattr(image_index, "_RACY_NS", 10**15)
    look(images, path)
    look(images, path)
    assert len(decoded) == 8


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(images, path, decoded, monkeypatch):
    def change(image):
        found = inspect_image(image)
        Image.new("RGB", (9, 9)).save(image)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(image_index, "inspect_image", change)
        look(images, path)
    assert look(images, path) == [inspect_image(image) for image in images]
    assert len(decoded) == 4


def test_an_image_that_cannot_be_used_is_tried_each_time(images, path, decoded):
    images[0].write_bytes(images[0].read_bytes()[:40])
    for _ in range(2):
        found = look(images, path)
        assert isinstance(found[0], ImageError) and all(isinstance(one, tuple) for one in found[1:])
    assert decoded.count("0.png") == 2 and decoded.count("1.png") == 1


@pytest.mark.parametrize("step", [1, 97])
def test_a_damaged_index_gives_what_the_images_are_and_is_made_anew(step, images, path, decoded):
    expected = fill(images, path, decoded)
    sound = path.read_bytes()
    for at in range(0, len(sound), step if step > 1 else len(sound) // 40):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
        assert look(images, path) == expected
    for content in (b"", b"no database", sound[:100], sound[: len(sound) // 2], os.urandom(9000)):
        path.write_bytes(content)
        assert look(images, path) == expected
        decoded.clear()
        assert look(images, path) == expected
        assert not decoded or look(images, path) == expected
    look(images, path)
    decoded.clear()
    assert look(images, path) == expected and not decoded


def test_a_digest_that_was_changed_in_the_index_is_not_believed(images, path, decoded):
    expected = fill(images, path, decoded)
    with sqlite3.connect(path) as database:
        for key, value in database.execute("SELECT key, value FROM images").fetchall():
            changed = bytes([value[0] ^ 1]) + value[1:]
            database.execute("UPDATE images SET value = ? WHERE key = ?", (changed, key))
    database.close()
    assert look(images, path) == expected and len(decoded) == 4


def test_an_index_of_another_shape_is_made_anew(images, path, decoded):
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE images (name TEXT)")
    database.close()
    look(images, path)
    fill(images, path, decoded)
    look(images, path)
    assert not decoded


@pytest.mark.parametrize("obstacle", ["a file", "a folder", "a link", "a pipe", "a lock", "no sqlite"])
def test_where_there_can_be_no_index_images_are_decoded(obstacle, images, path, decoded, monkeypatch):
    other = None
    if obstacle == "a file":
        path.parent.write_text("in the way")
    elif obstacle == "a folder":
        path.mkdir(parents=True)
    elif obstacle == "a link":
        path.parent.mkdir()
        path.symlink_to(path.with_name("elsewhere"))
    elif obstacle == "a pipe":
        path.parent.mkdir()
        os.mkfifo(path)
    elif obstacle == "a lock":
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **(k | {"timeout": 0})))
        path.parent.mkdir()
        other = connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
    else:
        monkeypatch.setitem(sys.modules, "sqlite3", None)
        image_index._errors.cache_clear()
    for _ in range(2):
        assert look(images, path) == [inspect_image(image) for image in images]
    image_index._errors.cache_clear()
    assert len(decoded) == 8
    if other is not None:
        other.close()
    assert not path.with_name("elsewhere").exists()


def test_a_full_disk_only_means_that_nothing_is_kept(images, path, decoded, monkeypatch):
    connect = sqlite3.connect

    def connect_full(*args, **settings):
        database = connect(*args, **settings)
        database.execute(image_index._TABLE)
        database.execute("PRAGMA max_page_count = 1")
        return database

    monkeypatch.setattr(sqlite3, "connect", connect_full)
    many = images[0].parent
    for i in range(200):
        Image.new("RGB", (1, 1)).save(many / f"more{i}.png")
    every = sorted(many.iterdir())
    assert look(every, path) == [inspect_image(image) for image in every]
    assert path.stat().st_size < 20_000


def test_a_killed_process_leaves_what_it_had_written(images, path, decoded):
    code = """
import os, signal, sys
from pathlib import Path
from caption_train.data import image_index
image_index._RACY_NS, image_index._BATCH_ROWS = -10**15, 2
index = image_index.ImageIndex(Path(sys.argv[1])).__enter__()
for name in sys.argv[2:5]:
    index.inspect(Path(name))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, path, *images], check=False)
    assert done.returncode == -signal.SIGKILL
    look(images, path)
    assert sorted(decoded) == ["2.png", "3.png"]


def test_several_processes_fill_one_index(images, path, decoded):
    code = """
import sys
from pathlib import Path
from caption_train.data import image_index
image_index._RACY_NS, image_index._BATCH_ROWS = -10**15, 1
index = image_index.ImageIndex(Path(sys.argv[1]))
image_index.inspect_images([Path(name) for name in sys.argv[2:]], show_progress=False, index=index)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code, path, *map(str, images[half::2])]) for half in (0, 1)
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    look(images, path)
    assert not decoded


def test_old_rows_are_dropped_and_used_ones_are_not(images, path, decoded, monkeypatch):
    now = time.time()
    look(images[:2], path)
    monkeypatch.setattr(time, "time", lambda: now + 150 * 86_400)
    look(images[:1], path)
    monkeypatch.setattr(time, "time", lambda: now + 200 * 86_400)
    look(images[2:3], path)
    decoded.clear()
    look(images[:3], path)
    assert decoded == ["1.png"]


def test_the_number_of_rows_is_bounded(images, path, decoded, monkeypatch):
    monkeypatch.setattr(image_index, "MAX_ROWS", 3)
    look(images, path)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM images").fetchone() == (3,)
    database.close()


def test_names_that_are_no_utf8_are_known(path, decoded, tmp_path):
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    Image.new("RGB", (4, 4)).save(name, format="PNG")
    look([name], path)
    look([name], path)
    assert len(decoded) == 1
