"""The captioning job on a family without a model: what is captioned, kept, skipped, written and said."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from caption_train.captioning.job import caption_folder
from caption_train.captioning.outputs import KeyedOutputs
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from tests.fixtures.browser import until
from tests.fixtures.fake_family import FakeFamily


@pytest.fixture
def folder(tmp_path):
    """Seven images from black to white, 0.png … 6.png."""
    for level in range(7):
        Image.new("RGB", (8, 6), (level * 42,) * 3).save(tmp_path / f"{level}.png")
    return tmp_path


def run(family, images, **options):
    settings = {"images": [str(images)], "num_workers": 0, "batch_size": 2} | options
    return caption_folder(CaptionOptions(**settings), family)


def captions(folder, extension=".txt"):
    return {path.name: path.read_text().strip() for path in sorted(folder.glob(f"*{extension}"))}


def test_captions_go_to_the_terminal_in_order(folder, capsys):
    assert run(FakeFamily(), folder) == 0
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(folder / f"{i}.png") for i in range(7)]
    assert "0.png: say dark" in out
    assert "6.png: say white" in out
    assert "7 images captioned" in err
    assert captions(folder) == {}


def test_captions_are_written_beside_the_images(folder):
    assert run(FakeFamily(), folder, save_captions=True, caption_extension="caption") == 0
    assert captions(folder, ".caption")["0.caption"] == "say dark"
    assert len(captions(folder, ".caption")) == 7


def test_an_existing_caption_is_kept_and_not_captioned_again(folder, capsys):
    (folder / "3.txt").write_text("by hand")
    family = FakeFamily()
    run(family, folder, save_captions=True)
    assert captions(folder)["3.txt"] == "by hand"
    assert sum(family.model.batches) == 6
    assert "1 kept" in capsys.readouterr().err


def test_overwrite_captions_all_again(folder):
    (folder / "3.txt").write_text("by hand")
    family = FakeFamily()
    run(family, folder, save_captions=True, overwrite=True)
    assert captions(folder)["3.txt"] == "say grey"
    assert sum(family.model.batches) == 7


def test_nothing_is_loaded_when_all_have_captions(folder):
    run(FakeFamily(), folder, save_captions=True)
    family = FakeFamily()
    assert run(family, folder, save_captions=True) == 0
    assert family.loaded == []


def test_unreadable_images_are_named_and_the_rest_captioned(folder, capsys):
    (folder / "2.png").write_bytes(b"no image")
    (folder / "5.png").write_bytes(b"")
    assert run(FakeFamily(), folder) == 1
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert run(FakeFamily(), folder, save_captions=True) == 1
    err = capsys.readouterr().err
    assert "2 images could not be read" in err
    assert str(folder / "2.png") in err
    assert str(folder / "5.png") in err
    assert sorted(captions(folder)) == ["0.txt", "1.txt", "3.txt", "4.txt", "6.txt"]


def test_a_batch_of_unreadable_images_only_is_skipped(folder):
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes(b"no image")
    family = FakeFamily()
    assert run(family, folder, save_captions=True) == 1
    assert family.model.batches == [2, 2, 1]


def test_names_missing_from_a_list_are_named_and_the_rest_captioned(folder, capsys):
    (folder / "list.txt").write_text("0.png\ngone.png\n1.png\n")
    assert run(FakeFamily(), folder / "list.txt") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "gone.png: there is no such file" in err
    assert "list.txt:2" in err


def test_workers_and_batches_change_no_caption(folder):
    for number, settings in enumerate(({"batch_size": 1}, {"batch_size": 5}, {"num_workers": 2})):
        run(FakeFamily(), folder, output=folder / f"{number}.jsonl", **settings)
    texts = [(folder / f"{number}.jsonl").read_text() for number in range(3)]
    assert texts[0] == texts[1] == texts[2]


def test_sampling_depends_on_the_seed_and_the_image_alone(folder):
    sampled = {"temperature": 5.0, "seed": 1}
    variants = (sampled, sampled | {"batch_size": 7}, sampled | {"seed": 2})
    for number, settings in enumerate(variants):
        run(FakeFamily(), folder, output=folder / f"{number}.jsonl", **settings)
    run(FakeFamily(), folder / "4.png", output=folder / "alone.jsonl", **sampled)
    texts = [(folder / f"{number}.jsonl").read_text() for number in range(3)]
    assert texts[0] == texts[1] != texts[2]
    assert (folder / "alone.jsonl").read_text() == texts[0].splitlines(keepends=True)[4]


def test_what_was_finished_survives_an_interrupt_and_the_next_run_goes_on(folder, capsys):
    output = folder / "captions.jsonl"
    assert run(FakeFamily(KeyboardInterrupt()), folder, save_captions=True, output=output) == 130
    assert "Interrupted: 4 of 7" in capsys.readouterr().err
    assert len(captions(folder)) == len(output.read_text().splitlines()) == 4
    family = FakeFamily()
    assert run(family, folder, save_captions=True, output=output) == 0
    assert sum(family.model.batches) == 3
    names = [json.loads(line)["file_name"] for line in output.read_text().splitlines()]
    assert names == [f"{level}.png" for level in range(7)]


def test_sigterm_ends_the_run_as_an_interrupt_does(folder):
    class Sigterm(FakeFamily):
        def generate(self, *arguments, **settings):
            if len(self.model.batches) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().generate(*arguments, **settings)

    assert run(Sigterm(), folder, save_captions=True) == 143
    assert len(captions(folder)) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Narrow(FakeFamily):
    """Has memory for one image at a time."""

    def generate(self, model, processor, batch, **settings):
        if len(batch["pixel_values"]) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().generate(model, processor, batch, **settings)


def test_a_batch_that_does_not_fit_is_halved_and_no_image_is_lost_or_made_twice(folder, capsys):
    plain, narrow = folder / "plain.jsonl", folder / "narrow.jsonl"
    run(FakeFamily(), folder, output=plain, batch_size=4)
    run(Narrow(), folder, output=narrow, batch_size=4)
    assert plain.read_text() == narrow.read_text()
    err = capsys.readouterr().err
    assert err.count("going on with") == 2 and "--batch_size 2: going on with 1" in err


def test_an_error_keeps_what_was_finished(folder):
    output = folder / "captions.jsonl"
    with pytest.raises(CaptionTrainError, match=r"--batch_size 1.*bfloat16"):
        run(FakeFamily(RuntimeError("CUDA out of memory. Tried")), folder, output=output, batch_size=1)
    assert len(output.read_text().splitlines()) == 2


class Typing(FakeFamily):
    """While its first batch is made, a person captions 0.png in its file and 1.png in the row of `output`."""

    def __init__(self, folder, output):
        super().__init__()
        self.folder, self.output = folder, output

    def generate(self, *arguments, **settings):
        if not self.model.batches:
            (self.folder / "0.txt").write_text("by hand")
            self.output.write_text('{"file_name": "1.png", "text": "by hand"}\n')
        return super().generate(*arguments, **settings)


def test_what_a_person_writes_while_the_run_is_at_work_stays_and_is_said(folder, capsys):
    output = folder / "captions.jsonl"
    assert run(Typing(folder, output), folder, save_captions=True, output=output) == 0
    assert captions(folder)["0.txt"] == "by hand"
    rows = {row["file_name"]: row["text"] for row in map(json.loads, output.read_text().splitlines())}
    assert rows["0.png"] == rows["1.png"] == "by hand"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "somebody else" in line]
    assert line.startswith("2 images got a caption") and "0.png" in line and "1.png" in line


def test_the_model_goes_on_while_captions_are_written(folder, monkeypatch):
    family, write = FakeFamily(), KeyedOutputs.write

    def write_late(outputs, caption, key):
        until(lambda: len(family.model.batches) >= 2)
        return write(outputs, caption, key)

    monkeypatch.setattr(KeyedOutputs, "write", write_late)
    assert run(family, folder, save_captions=True, output=folder / "captions.jsonl") == 0
    assert len(captions(folder)) == len((folder / "captions.jsonl").read_text().splitlines()) == 7


def test_a_caption_that_is_written_in_the_instant_of_an_interrupt_is_counted(folder, capsys, monkeypatch):
    def escape(text):
        if text == folder / "2.png" and not interrupted:
            interrupted.append(text)
            raise KeyboardInterrupt
        return escape_unprintable(text)

    interrupted = []
    monkeypatch.setattr("caption_train.captioning.job.escape_unprintable", escape)
    assert run(FakeFamily(), folder, save_captions=True) == 130
    count = len(captions(folder))
    assert interrupted and count >= 3 and f"Interrupted: {count} of 7" in capsys.readouterr().err


def test_an_interrupt_waits_for_captions_on_their_way_to_the_disk(folder, capsys, monkeypatch):
    write = KeyedOutputs.write

    def write_slowly(outputs, caption, key):
        time.sleep(0.05)
        return write(outputs, caption, key)

    monkeypatch.setattr(KeyedOutputs, "write", write_slowly)
    output = folder / "captions.jsonl"
    assert run(FakeFamily(KeyboardInterrupt()), folder, save_captions=True, output=output) == 130
    assert "Interrupted: 4 of 7" in capsys.readouterr().err
    assert len(captions(folder)) == len(output.read_text().splitlines()) == 4


def test_a_disk_that_fills_up_ends_the_run_with_what_was_written_before(folder, monkeypatch):
    write = KeyedOutputs.write

    def fill(outputs, caption, key):
        if caption.image.name == "3.png":
            raise CaptionTrainError("3.txt: cannot be written: No space left on device")
        return write(outputs, caption, key)

    monkeypatch.setattr(KeyedOutputs, "write", fill)
    output = folder / "captions.jsonl"
    with pytest.raises(CaptionTrainError, match=r"^3\.txt: cannot be written"):
        run(FakeFamily(), folder, save_captions=True, output=output)
    assert list(captions(folder)) == ["0.txt", "1.txt", "2.txt"]
    assert len(output.read_text().splitlines()) == 3


def test_a_second_run_into_the_folder_is_refused_in_one_line(folder):
    class Second(FakeFamily):
        def generate(self, *arguments, **settings):
            with pytest.raises(CaptionTrainError, match="another run") as caught:
                run(FakeFamily(), folder, save_captions=True)
            assert len(str(caught.value).splitlines()) == 1
            return super().generate(*arguments, **settings)

    assert run(Second(), folder, save_captions=True) == 0
    assert len(captions(folder)) == 7 and not list(folder.glob(".*"))


def test_a_full_disk_is_one_line_that_names_the_file(folder, monkeypatch):
    def fill(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("caption_train.captioning.sinks.sidecars.create_atomically", fill)
    output = folder / "captions.jsonl"
    with pytest.raises(CaptionTrainError, match=r"0\.txt: cannot be written: No space left on device"):
        run(FakeFamily(), folder, save_captions=True, output=output)
    assert not output.exists()


def test_a_usage_error_in_a_worker_keeps_its_message(folder):
    with pytest.raises(UsageError) as caught:
        run(FakeFamily(), folder, prompt="refused", num_workers=1)
    assert str(caught.value) == "--prompt: refused"


def test_a_worker_that_is_killed_is_one_line_that_names_the_flag(folder):
    with pytest.raises(CaptionTrainError, match="--num_workers"):
        run(FakeFamily(), folder, prompt="die", num_workers=1)


def test_prefix_suffix_and_trigger_frame_the_caption(folder):
    run(FakeFamily(), folder / "0.png", prefix="a ", suffix=", photo", trigger="zwx", save_captions=True)
    assert captions(folder) == {"0.txt": "zwx, a say dark, photo"}


def test_remarks_are_counted_and_written(folder, capsys):
    output = folder / "captions.jsonl"
    run(FakeFamily(), folder, output=output, max_token_length=1)
    assert "7 reached the token limit without an end" in capsys.readouterr().err
    assert json.loads(output.read_text().splitlines()[0])["remarks"] == ["cut"]


def test_answers_are_written_with_the_captions(folder):
    class Answering(FakeFamily):
        def parse_answer(self, text, prompt, size):
            return {"boxes": [[0, 0, *size]]} if "dark" in text else None

    run(Answering(), folder, output=folder / "captions.jsonl")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert rows[0]["answer"] == {"boxes": [[0, 0, 8, 6]]}
    assert "answer" not in rows[6]


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "fake/large"}))
    training = {"family": "fake", "base_model": "fake/large", "revision": "abc", "prompt": "speak"}
    (folder / "training.json").write_text(json.dumps(training))
    return folder


def test_an_adapter_brings_its_base_revision_and_prompt(folder, adapter, monkeypatch, capsys):
    # Importing PEFT takes longer than all other tests here.
    load = SimpleNamespace(
        load_adapter=lambda model, folder, family: model, merge_adapter=lambda model, family: model
    )
    monkeypatch.setitem(sys.modules, "caption_train.adapters.load", load)
    family = FakeFamily()
    run(family, folder / "0.png", peft_model=adapter)
    assert [loaded[:2] for loaded in family.loaded] == [("fake/large", "abc")]
    assert "speak dark" in capsys.readouterr().out


def test_an_adapter_of_another_base_is_refused_before_loading(folder, adapter):
    family = FakeFamily()
    with pytest.raises(UsageError, match="trained on fake/large"):
        run(family, folder, peft_model=adapter, base_model="fake/base")
    assert family.loaded == []


def test_an_adapter_of_another_family_is_refused_before_loading(folder, adapter):
    (adapter / "training.json").write_text(json.dumps({"family": "other"}))
    with pytest.raises(UsageError, match="trained on other, not on fake"):
        run(FakeFamily(), folder, peft_model=adapter)


def test_answers_are_drawn_on_copies_that_keep_names_and_formats(folder):
    class Drawing(FakeFamily):
        draws_answers = True

        def parse_answer(self, text, prompt, size):
            return {"boxes": []} if "white" in text else None

        def draw_answer(self, image, answer):
            return Image.new("RGB", image.size, "red")

    (folder / "sub").mkdir()
    Image.new("RGB", (4, 4), "white").save(folder / "sub" / "w.JPG")
    original = (folder / "6.png").read_bytes()
    run(Drawing(), folder, recursive=True, visualize=folder / "drawn")
    drawn = [path.relative_to(folder / "drawn").as_posix() for path in (folder / "drawn").rglob("*.*")]
    assert sorted(drawn) == ["6.png", "sub/w.JPG"]
    with Image.open(folder / "drawn/sub/w.JPG") as image:
        assert (image.format, image.getpixel((0, 0))[0] > 250) == ("JPEG", True)
    assert (folder / "6.png").read_bytes() == original
    Image.new("RGB", (4, 4)).save(folder / "sub" / "6.png")
    for target in (folder, folder / "sub"):
        with pytest.raises(UsageError, match="would replace the images"):
            run(Drawing(), folder, recursive=True, visualize=target)


def test_a_list_of_nothing_draws_nothing(folder):
    class Drawing(FakeFamily):
        draws_answers = True

    (folder / "list.txt").write_text("gone.png\n")
    assert run(Drawing(), folder / "list.txt", visualize=folder / "drawn") == 1


def test_visualize_needs_a_family_that_draws(folder):
    with pytest.raises(UsageError, match="--visualize"):
        run(FakeFamily(), folder, visualize=folder / "drawn")


def test_an_unknown_device_is_refused_by_flag(folder):
    with pytest.raises(UsageError, match="--device quantum"):
        run(FakeFamily(), folder, device="quantum")
