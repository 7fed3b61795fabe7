import pytest

from tests.fixtures.sample_set import compile_folder, counted, make_folder, rows_of, write_image


@pytest.fixture
def dataset(tmp_path):
    return make_folder(tmp_path / "data")


def test_copies_of_an_image_with_different_captions_are_named(dataset, capsys):
    for name, caption in (("x.png", "a fox"), ("y.png", "a fox"), ("sub/z.png", "a vixen " * 9)):
        (dataset / name).parent.mkdir(exist_ok=True)
        write_image(dataset / name)
        (dataset / name).write_bytes((dataset / "x.png").read_bytes())
        (dataset / name).with_suffix(".txt").write_text(caption)
    copy = (dataset / "a.png").read_bytes()
    (dataset / "a2.png").write_bytes(copy)
    (dataset / "a2.txt").write_text("caption of a.png")
    assert compile_folder(dataset) == 0
    count, lines = counted(capsys, "equal images, other captions")
    assert count == 1 and "x.png (a fox), y.png (a fox)" in lines[0]
    assert "sub/z.png (a vixen a vixen a vixen a vixen a vixen…)" in lines[0]
    assert len(rows_of(dataset)) == 8


def test_equal_sizes_are_no_equal_images(dataset, capsys):
    for name in ("x", "y"):
        write_image(dataset / f"{name}.png")
        content = bytearray((dataset / "x.png").read_bytes())
        content[-1] += name == "y"
        (dataset / f"{name}.png").write_bytes(content)
        (dataset / f"{name}.txt").write_text(f"caption {name}")
    compile_folder(dataset)
    assert "equal images" not in capsys.readouterr().out


def test_captions_that_spell_out_a_token_are_named_with_it(dataset, capsys):
    (dataset / "a.txt").write_text("a fox</s> and <|im_end|> and </s>")
    (dataset / "b/c.txt").write_text("[SEP] <b>bold</b> [brackets] <3 >.< <|> [1] <loc_3>")
    assert compile_folder(dataset) == 0
    assert counted(capsys, "captions that spell a token") == (2, ["a.png: </s> <|im_end|>", "b/c.jpg: [SEP]"])
    assert rows_of(dataset)[0]["text"] == "a fox</s> and <|im_end|> and </s>"
