import errno
from pathlib import Path

import pytest

from caption_train.compiling.placement import find_prefix, place_images, plan_placement
from caption_train.errors import UsageError


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "a/x.png").write_bytes(b"x")
    (folder / "y.png").write_bytes(b"y")
    return folder


NAMES = ["a/x.png", "y.png"]


def place(dataset, output, **settings):
    todo, conflicts = plan_placement(dataset, NAMES, output, **settings)
    return place_images(todo, **settings), conflicts


def test_a_folder_that_holds_the_dataset_needs_no_images(dataset, tmp_path):
    assert find_prefix(dataset, dataset) == ""
    assert find_prefix(dataset / "a", tmp_path) == "data/a/"
    assert find_prefix(dataset, tmp_path / "elsewhere") is None
    assert find_prefix(dataset, tmp_path / "data2") is None


def test_the_same_folder_by_a_link_is_the_same_folder(dataset, tmp_path):
    (tmp_path / "link").symlink_to(dataset)
    assert find_prefix(dataset, tmp_path / "link") == ""


def test_a_folder_inside_the_dataset_or_a_file_is_refused(dataset):
    with pytest.raises(UsageError, match="lies inside dataset_dir"):
        find_prefix(dataset, dataset / "a/out")
    with pytest.raises(UsageError, match="is a file"):
        find_prefix(dataset, dataset / "y.png")


def test_images_are_hard_links_and_a_second_run_has_nothing_to_do(dataset, tmp_path):
    out = tmp_path / "out"
    assert place(dataset, out) == (0, [])
    assert all((out / name).samefile(dataset / name) for name in NAMES)
    assert plan_placement(dataset, NAMES, out) == ([], [])


def test_copies_are_on_request_even_after_links(dataset, tmp_path):
    out = tmp_path / "out"
    place(dataset, out)
    assert place(dataset, out, by_copy=True) == (2, [])
    assert not (out / "y.png").samefile(dataset / "y.png")
    assert (out / "y.png").read_bytes() == b"y"
    assert plan_placement(dataset, NAMES, out, by_copy=True) == ([], [])


def test_where_there_can_be_no_link_there_is_a_copy(dataset, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert place(dataset, tmp_path / "out")[0] == 2
    assert (tmp_path / "out/a/x.png").read_bytes() == b"x"


def test_another_image_of_the_same_name_is_told_and_nothing_is_touched_while_planning(dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "y.png").write_bytes(b"another")
    todo, conflicts = plan_placement(dataset, NAMES, out)
    assert conflicts == ["y.png"]
    assert (out / "y.png").read_bytes() == b"another"
    place_images(todo)
    assert (out / "y.png").read_bytes() == b"y"


def test_a_link_in_the_way_is_replaced_not_written_through(dataset, tmp_path):
    precious, out = tmp_path / "precious.png", tmp_path / "out"
    precious.write_bytes(b"precious")
    out.mkdir()
    (out / "y.png").symlink_to(precious)
    assert place(dataset, out, by_copy=True)[1] == ["y.png"]
    assert precious.read_bytes() == b"precious"
    assert not (out / "y.png").is_symlink()


def test_a_symbolic_link_in_the_dataset_becomes_its_image(dataset, tmp_path):
    (dataset / "y.png").unlink()
    (dataset / "y.png").symlink_to("a/x.png")
    place(dataset, tmp_path / "out")
    assert not (tmp_path / "out/y.png").is_symlink()
    assert (tmp_path / "out/y.png").read_bytes() == b"x"
