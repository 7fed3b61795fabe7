import pytest

from caption_train.data.dataset import read_dataset
from tests.fixtures.sample_set import compile_folder, make_folder, write_pair


@pytest.fixture
def dataset(tmp_path):
    return make_folder(tmp_path / "my data")


def load_imagefolder(folder, cache):
    from datasets import load_dataset

    return load_dataset(
        "imagefolder", data_dir=str(folder), data_files={"train": "**"}, split="train", cache_dir=str(cache)
    )


@pytest.mark.parametrize("output", [None, "..", "../elsewhere"])
def test_datasets_loads_the_result(dataset, tmp_path, output):
    output = dataset / output if output else None
    compile_folder(dataset, output, validation_split=0.3)
    loaded = load_imagefolder(output or dataset, tmp_path / "cache")
    assert sorted(loaded["text"]) == sorted(
        pair.caption for pair in read_dataset(output or dataset, split=None)
    )
    assert loaded.column_names == ["image", "text", "split"]
    assert all(image.size == (4, 3) for image in loaded["image"])


def test_datasets_loads_plain_names_without_data_files(tmp_path):
    from datasets import load_dataset

    write_pair(tmp_path / "data/sub/a.png", "a dog")
    compile_folder(tmp_path / "data")
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["text"][:] == ["a dog"]


def test_repeated_rows_load_too(tmp_path):
    write_pair(tmp_path / "data/3_dog/a.png", "a dog")
    write_pair(tmp_path / "data/b.png", "no folder")
    compile_folder(tmp_path / "data", kohya_repeats=True)
    assert len(load_imagefolder(tmp_path / "data", tmp_path / "cache")) == 4
