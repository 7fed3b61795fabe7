"""A dataset in tars is evaluated as the same files in folders are."""

from caption_train.config.evaluation import EvaluateOptions
from caption_train.evaluation.questions import read_questions
from tests.fixtures.shards import make_image, write_tar


def test_the_questions_of_tars_are_those_of_the_files(tmp_path):
    members = [(f"{n}.png", make_image(n)) for n in range(4)] + [("0.txt", "a"), ("2.txt", "b")]
    (tmp_path / "files/set").mkdir(parents=True)
    for name, content in members:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / "files/set" / name).write_bytes(content)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/set.tar", sorted(members))
    found = [
        read_questions(EvaluateOptions(dataset_dir=tmp_path / place, output_dir=tmp_path / "out"))
        for place in ("files", "tars")
    ]
    for files, tars in zip(*(each.questions for each in found), strict=True):
        assert (files.digest, files.references) == (tars.digest, tars.references)
        assert files.name == tars.name.replace("set.tar", "set")
    assert len(found[1].questions) == 2 and found[0].split == found[1].split
