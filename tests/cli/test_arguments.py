"""A command line from a dataclass, and the YAML file behind it."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.cli.arguments import parse_options
from caption_train.cli.commands import caption_main, train_main
from caption_train.config.fields import flag
from caption_train.config.training import TrainOptions
from caption_train.errors import UsageError


@dataclass
class Options:
    folder: Path = flag(None, "a folder")
    count: int = flag(3, "how many, 100 % of them")
    rate: float = flag(0.5, "how fast")
    words: list[str] = flag(["a", "b"], "words")
    endings: list[str] = flag([".txt"], "endings", repeated=True)
    loud: bool = flag(False, "shout")
    kind: str | None = flag(None, "which kind", choices=("one", "two"), const="one")
    limit: int | None = flag(None, "at most", aliases=("-l",))
    second: Path | None = flag(None, "another folder")
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def check(self):
        return [f"--{name} is negative" for name in ("count", "rate") if getattr(self, name) < 0]


def parse(*argv, **settings):
    return parse_options(Options, list(argv), prog="prog", positionals=("folder",), **settings)


def from_yaml(tmp_path, text, *argv):
    config = tmp_path / "flags.yaml"
    config.write_text(text)
    return parse("--config", str(config), *argv)


def test_nothing_given_leaves_the_defaults():
    assert parse() == Options()
    assert parse(defaults={"count": 7}).count == 7


def test_values_have_the_types_of_their_fields():
    options = parse(*shlex.split("data --count 4 --rate 1e-3 --words x y --loud --kind two -l 9"))
    assert options == Options(Path("data"), 4, 1e-3, ["x", "y"], [".txt"], True, "two", 9)


def test_a_flag_given_alone_has_its_constant():
    assert parse("--kind").kind == "one"
    assert parse("--kind", "--loud").kind == "one"


def test_what_follows_a_switch_is_not_taken_for_its_value():
    assert parse("--kind", "data") == parse("data", "--kind") == Options(Path("data"), kind="one")
    assert parse("--kind", "two", "data") == Options(Path("data"), kind="two")


def test_a_folder_given_twice_or_empty_is_refused():
    assert parse("data", "--folder", "data").folder == Path("data")
    with pytest.raises(UsageError, match="give it once"):
        parse("data", "--folder", "other")
    with pytest.raises(UsageError, match="empty"):
        parse("--folder", "")


def test_flags_may_stand_between_positions():
    options = parse_options(
        Options, ["a", "--count", "2", "b"], prog="prog", positionals=("folder", "second")
    )
    assert (options.folder, options.count, options.second) == (Path("a"), 2, Path("b"))


def test_yaml_no_is_the_word_where_a_flag_offers_it(tmp_path):
    choices = {"kind": ("no", "one")}
    config = tmp_path / "flags.yaml"
    config.write_text("kind: no\n")
    assert parse("--config", str(config), choices=choices).kind == "no"
    config.write_text("kind: two\n")
    with pytest.raises(UsageError, match="kind: 'two' is not a valid value"):
        parse("--config", str(config), choices=choices)


def test_a_list_given_replaces_the_default():
    assert parse("--words", "x", "--words", "y", "z").words == ["x", "y", "z"]
    assert parse("--endings", ".a", "--endings", ".b").endings == [".a", ".b"]


def test_a_position_and_its_flag_are_the_same():
    assert parse("data").folder == parse("--folder", "data").folder == Path("data")


def test_all_problems_are_said_at_once():
    with pytest.raises(UsageError, match="--count is negative\n--rate is negative"):
        parse("--count=-1", "--rate=-1")


@pytest.mark.parametrize(
    "argv",
    [
        "--count many",
        "--kind=three",
        "--cuont 1",
        "a b",
        "--count",
        "--coun 1",
        "--rate nan",
        "--kind three b",
    ],
)
def test_what_cannot_be_read_is_one_line(argv):
    with pytest.raises(UsageError) as caught:
        parse(*argv.split())
    assert "\n" not in str(caught.value) and "prog --help" in str(caught.value)


def test_the_command_line_wins_over_the_file_and_both_are_named(tmp_path):
    options = from_yaml(tmp_path, "count: 5\nrate: 2\nwords: [x]\nkind: true\nloud: true\n", "--count", "6")
    assert options == Options(count=6, rate=2.0, words=["x"], kind="one", loud=True)
    assert options.sources["count"] == "command line"
    assert options.sources["rate"].endswith("flags.yaml")


def test_an_empty_file_says_nothing(tmp_path):
    assert from_yaml(tmp_path, "# nothing\n") == Options()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cuont: 1", "did you mean count"),
        ("count: many", "'many' is not a valid value"),
        ("count: 1.5", "1.5 is not a valid value"),
        ("count: true", "True is not a valid value"),
        ("count: null", "None is not a valid value"),
        ("loud: 1", "1 is not a valid value"),
        ("kind: three", "'three' is not a valid value"),
        ("- count", "must be a mapping"),
        ("count: [", "cannot be read as YAML"),
        ("sources: {}", "unknown key"),
    ],
)
def test_what_a_file_gets_wrong_is_named(tmp_path, text, named):
    with pytest.raises(UsageError, match=named) as caught:
        from_yaml(tmp_path, text)
    assert "\n" not in str(caught.value) and "flags.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_help_shows_defaults_and_percent_signs(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "100 % of them (default: 3)" in text and "(default: a b)" in text


def test_an_omitted_flag_is_unknown():
    with pytest.raises(UsageError, match="--loud"):
        parse("--loud", omit=("loud",))


@given(st.integers(0, 10**9), st.floats(0, 1e6, allow_nan=False), st.text(min_size=1))
def test_any_value_comes_through(count, rate, folder):
    argv = [f"--count={count}", f"--rate={rate!r}", f"--folder={folder}"]
    options = parse(*argv)
    assert (options.count, options.rate, options.folder) == (count, rate, Path(folder))


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning_rate"),
        ("--epoch", "--epochs"),
        ("--batch-size", "--batch_size"),
        ("--lora_r", "--rank"),
        ("--base_model", "--model_id"),
        ("--peft_model", "--init_adapter"),
        ("--resume_from_checkpoint", "--resume"),
    ],
)
def test_an_unknown_flag_names_the_one_that_was_meant(flag, meant, capsys):
    assert train_main("blip", [flag, "1"]) == 2
    error = capsys.readouterr().err
    assert f"{flag}; did you mean {meant}?" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--model_id", "--base_model"), ("--append", "--existing"), ("--ext", "--caption_extension")],
)
def test_an_unknown_flag_of_captioning_names_the_one_that_was_meant(flag, meant, capsys):
    assert caption_main("blip", [flag, "1"]) == 2
    assert f"{flag}; did you mean {meant}?" in capsys.readouterr().err


def test_an_unknown_key_of_a_config_file_names_the_flag_that_was_meant(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("lr: 1\nlearning-rate: 1\n")
    assert train_main("blip", ["--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert "'lr'; did you mean learning_rate?" in error
    assert "'learning-rate'; did you mean learning_rate?" in error


def test_a_flag_like_no_other_is_only_named(capsys):
    assert train_main("blip", ["--xyzzy=3"]) == 2
    assert "unrecognized arguments: --xyzzy (see" in capsys.readouterr().err


def test_images_may_be_given_by_position(parsed):
    caption_main("blip", ["a.png", "b.png", "--beams", "2"])
    caption_main("blip", ["--images", "a.png", "b.png"])
    assert [options.images for options in parsed] == [["a.png", "b.png"]] * 2


@pytest.mark.parametrize(
    "text",
    [
        "name: 2026-13-45",
        "seed: !!int abc",
        "seed: " + "9" * 5_000,
        "seed: 0x" + "f" * 5_000,
        "learning_rate: 0x" + "f" * 5_000,
        "name: " + "[" * 5_000,
        '{"a": ' * 150_000 + "1" + "}" * 150_000,
        "? [a, b]\n: 1",
        "when: !!timestamp x",
        "a: &a [x, x]\n" + "".join(f"k{i}: &k{i} [*a, *a, *a]\n" for i in range(9)),
        "epochs: !!python/object/apply:os.system [exit 7]",
        "x" * 3_000 + ": 1",
        "name: \0",
        "seed: {" * 300 + "}" * 300,
    ],
)
def test_odd_yaml_is_one_line(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"--config .*a\.yaml") as error:
        parse_options(TrainOptions, ["--config", str(tmp_path / "a.yaml")], prog="train")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("kind", ["pipe", "folder", "zeros"])
def test_a_config_that_is_no_regular_file_is_never_waited_for(kind, tmp_path):
    path = tmp_path / "a.yaml"
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "zeros": lambda: path.symlink_to("/dev/zero")}[
        kind
    ]()
    with pytest.raises(UsageError, match="not a regular file"):
        parse_options(TrainOptions, ["--config", str(path)], prog="train")


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("3", 3)])
def test_a_count_may_be_left_to_the_machine(given, value, tmp_path):
    argv = ["--num_workers", given, "--dataset_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    settings = {"prog": "train", "description": "", "positionals": ()}
    assert parse_options(TrainOptions, argv, **settings).num_workers == value
    config = tmp_path / "run.yaml"
    config.write_text(f"num_workers: {given}\ndataset_dir: {tmp_path}\noutput_dir: {tmp_path}\n")
    assert parse_options(TrainOptions, ["--config", str(config)], **settings).num_workers == value
    for wrong in ("some", "-1"):
        with pytest.raises(UsageError, match="num_workers"):
            parse_options(TrainOptions, [*argv, "--num_workers", wrong], **settings)
    config.write_text(f"num_workers: 2.5\ndataset_dir: {tmp_path}\noutput_dir: {tmp_path}\n")
    with pytest.raises(UsageError, match="num_workers"):
        parse_options(TrainOptions, ["--config", str(config)], **settings)
