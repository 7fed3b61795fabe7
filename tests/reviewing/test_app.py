"""The page's interface as the page uses it: filters, saving, conflicts, find and replace, undo, the end."""

import errno
import json
import time

import pytest

from caption_train.data.dataset import read_dataset
from caption_train.reviewing.history import HISTORY_NAME
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.sample_set import write_image

CAPTIONS = {
    "a.png": "cat, sofa",
    "b.png": "cat, window, morning light",
    "c.png": "",
    "sub/a copy.png": "a black cat",
}


def names(page, **query):
    ids = page.get("ids", **query)["ids"]
    return [item["name"] for item in page.get("items", ids=",".join(ids))["items"]] if ids else []


def test_all_images_are_shown_with_their_captions(page):
    assert page.captions() == CAPTIONS
    state = page.get("state")
    assert (state["total"], state["captioned"], state["accepted"], state["model"]) == (4, 3, 0, None)


def test_filters(page):
    assert names(page, contains="CAT") == ["a.png", "b.png", "sub/a copy.png"]
    assert names(page, tag="window") == ["b.png"]
    assert names(page, tag="cat", contains="sofa") == ["a.png"]
    assert names(page, state="empty") == ["c.png"]
    assert names(page, longer_than="2") == ["b.png", "sub/a copy.png"]
    assert names(page, state="copies") == ["a.png", "sub/a copy.png"]
    assert page.post("mark", ids=[page.id_of("b.png")], flagged=True).status_code == 200
    assert names(page, state="flagged") == ["b.png"]
    page.save("a.png", "cat, sofa", "dog, sofa")
    assert names(page, state="changed") == ["a.png"]


@pytest.mark.parametrize(
    "query", [{"state": "bad"}, {"longer_than": "-1"}, {"longer_than": "5", "unit": "tokens"}]
)
def test_a_filter_that_there_is_not_is_refused(page, query):
    answer = page.client.get("/api/ids", params=query)
    assert answer.status_code == 422 and answer.json()["error"]


def test_a_saved_caption_is_what_training_reads(page, folder):
    assert page.save("c.png", "", "a red\n  square ").json()["item"]["caption"] == "a red square"
    assert (folder / "c.txt").read_text() == "a red square\n"
    assert {pair.image.name: pair.caption for pair in read_dataset(folder)}["c.png"] == "a red square"


def test_an_edit_made_elsewhere_is_a_conflict_with_both_texts(page, folder):
    (folder / "a.txt").write_text("written in an editor\n")
    answer = page.save("a.png", "cat, sofa", "mine")
    assert answer.status_code == 409
    assert answer.json()["conflict"] == {"theirs": "written in an editor", "yours": "mine"}
    assert (folder / "a.txt").read_text() == "written in an editor\n"
    assert page.get("state")["undo"] is None
    assert page.save("a.png", "written in an editor", "mine", action="conflict").status_code == 200
    assert (folder / "a.txt").read_text() == "mine\n"


def test_a_caption_that_came_elsewhere_is_not_written_over(page, folder):
    (folder / "c.txt").write_text("theirs\n")
    assert page.save("c.png", "", "mine").status_code == 409
    assert (folder / "c.txt").read_text() == "theirs\n"


def test_accepting_what_was_changed_elsewhere_is_a_conflict_too(page, folder):
    (folder / "a.txt").write_text("theirs\n")
    assert page.save("a.png", "cat, sofa", "cat, sofa", accept=True).status_code == 409
    assert page.get("state")["accepted"] == 0


def test_a_caption_is_accepted_as_it_is_and_no_longer_when_it_changes(page, folder):
    page.save("a.png", "cat, sofa", "cat, sofa", accept=True)
    page.save("b.png", "cat, window, morning light", "cat, window", accept=True)
    assert names(page, state="accepted") == ["a.png", "b.png"]
    page.save("a.png", "cat, sofa", "dog, sofa")
    (folder / "b.txt").write_text("theirs\n")
    page.post("refresh")
    assert names(page, state="accepted") == []


def test_an_image_without_a_caption_cannot_be_accepted(page):
    page.post("mark", ids=[page.id_of("c.png")], accepted=True)
    assert page.get("state")["accepted"] == 0


def test_find_and_replace_changes_what_was_previewed_and_is_undone_in_one_step(page, folder):
    chosen = [page.id_of(name) for name in ("a.png", "b.png", "c.png")]
    preview = page.post("preview", ids=chosen, find="cat", replace="dog\\1", whole_words=True).json()
    assert preview["count"] == 2
    assert preview["changes"][0] == {"name": "a.png", "before": "cat, sofa", "after": "dog\\1, sofa"}
    assert (folder / "a.txt").read_text() == "cat, sofa\n"
    (folder / "b.txt").write_text("theirs\n")
    answer = page.post("replace", preview=preview["preview"]).json()
    assert (answer["done"], [kept["name"] for kept in answer["kept"]]) == (1, ["b.png"])
    assert (folder / "a.txt").read_text() == "dog\\1, sofa\n"
    assert page.post("replace", preview=preview["preview"]).status_code == 422
    page.post("undo")
    assert [(folder / f"{name}.txt").read_text() for name in "ab"] == ["cat, sofa\n", "theirs\n"]
    assert (folder / "sub/a copy.txt").read_text() == "a black cat\n"


def test_an_edit_is_undone_after_a_restart(serve, folder):
    first = serve(folder)
    first.save("a.png", "cat, sofa", "one")
    first.save("c.png", "", "two")
    second = serve(folder)
    assert second.captions()["a.png"] == "one"
    assert second.post("undo").json()["undone"]["name"] == "c.png"
    assert not (folder / "c.txt").exists()
    assert second.post("undo").json()["undone"]["name"] == "a.png"
    assert (folder / "a.txt").read_text() == "cat, sofa\n"
    assert second.post("undo").status_code == 422
    third = serve(folder)
    assert third.get("state")["undo"] is None
    assert [batch["action"] for batch in third.get("history")["batches"]] == ["undo", "undo", "edit", "edit"]


def test_marks_are_undone_like_edits_after_a_restart_too(serve, folder):
    first = serve(folder)
    ids = [first.id_of(name) for name in ("a.png", "b.png")]
    first.post("mark", ids=ids, accepted=True)
    first.post("mark", ids=ids[:1], flagged=True)
    first.post("mark", ids=ids[:1], flagged=True)
    second = serve(folder)
    assert marks_of(second) == {"a.png": (True, True), "b.png": (True, False)}
    undone = second.post("undo").json()
    assert (undone["done"], undone["undone"]["action"]) == (1, "mark")
    assert (undone["undone"]["before"], undone["undone"]["after"]) == ("not flagged", "flagged")
    assert marks_of(second) == {"a.png": (True, False), "b.png": (True, False)}
    third = serve(folder)
    assert third.post("undo").json()["done"] == 2
    assert marks_of(third) == {"a.png": (False, False), "b.png": (False, False)}
    # Marking what is marked was no step.
    assert third.post("undo").status_code == 422
    assert [batch["action"] for batch in third.get("history")["batches"]] == ["undo", "undo", "mark", "mark"]


def marks_of(page):
    found = page.get("items", ids=",".join(page.get("ids")["ids"]))["items"]
    return {item["name"]: (item["accepted"], item["flagged"]) for item in found if item["name"][0] in "ab"}


def test_saving_and_accepting_is_one_step(page, folder):
    page.post("mark", ids=[page.id_of("a.png")], accepted=True)
    page.save("a.png", "cat, sofa", "one", accept=True)
    assert marks_of(page)["a.png"] == (True, False)
    page.post("undo")
    assert (folder / "a.txt").read_text() == "cat, sofa\n"
    # As before: the old caption was accepted.
    assert marks_of(page)["a.png"] == (True, False)
    page.post("undo")
    assert marks_of(page)["a.png"] == (False, False)


def test_undoing_an_older_mark_leaves_what_was_marked_since_then(page):
    id = page.id_of("a.png")
    page.post("mark", ids=[id], flagged=True)
    page.post("mark", ids=[id], flagged=False)
    page.post("mark", ids=[id], flagged=True)
    page.post("mark", ids=[id], accepted=True)
    oldest = page.get("history")["batches"][-1]
    page.post("undo", batch=page.get("history")["batches"][2]["batch"])
    assert marks_of(page)["a.png"] == (True, True)
    page.post("undo", batch=oldest["batch"])
    assert marks_of(page)["a.png"] == (True, False)


def test_marks_of_older_versions_count_and_are_no_steps(serve, folder):
    line = {"action": "mark", "name": "a.png", "accepted": "cat, sofa", "flagged": True}
    (folder / HISTORY_NAME).write_text(json.dumps(line) + "\n")
    page = serve(folder)
    assert marks_of(page)["a.png"] == (True, True)
    assert page.post("undo").status_code == 422


def test_undoing_leaves_what_was_written_since_then(page, folder):
    page.save("a.png", "cat, sofa", "one")
    (folder / "a.txt").write_text("theirs\n")
    answer = page.post("undo").json()
    assert (answer["done"], answer["kept_count"]) == (0, 1)
    assert (folder / "a.txt").read_text() == "theirs\n"


def test_a_mark_is_toggled_for_all_that_are_chosen_shown_or_not(page):
    ids = page.get("ids")["ids"]
    page.post("mark", ids=ids[:1], accepted=True)
    assert page.post("mark", ids=ids, toggle="accepted").status_code == 200
    assert page.get("state")["accepted"] == 3  # the fourth has no caption
    page.post("mark", ids=ids, toggle="accepted")
    assert page.get("state")["accepted"] == 0
    for expected in (4, 0):
        page.post("mark", ids=ids, toggle="flagged")
        assert page.get("state")["flagged"] == expected
    assert page.post("mark", ids=ids, toggle="deleted").status_code == 422


def test_a_full_disk_at_the_end_is_one_line(page, monkeypatch):
    page.post("mark", ids=[page.id_of("a.png")], accepted=True)

    def write(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "/photos-out/metadata.jsonl")

    monkeypatch.setattr("caption_train.reviewing.calls.write_accepted", write)
    answer = page.post("finish")
    assert answer.status_code == 422
    assert answer.json() == {"error": "/photos-out/metadata.jsonl: No space left on device"}


def test_undo_goes_further_back_past_what_cannot_be_undone(page, folder):
    page.save("a.png", "cat, sofa", "dog, sofa")
    page.save("b.png", "cat, window, morning light", "dog, window")
    page.save("c.png", "", "a car")
    (folder / "b.txt").write_text("from an editor")
    (folder / "c.png").unlink()
    page.post("refresh")
    assert page.post("undo").json()["error"] == "the images of this edit are not in the folder any more"
    assert page.post("undo").json()["kept"][0]["theirs"] == "from an editor"
    assert page.post("undo").json()["done"] == 1
    assert (folder / "a.txt").read_text() == "cat, sofa\n"
    assert page.get("state")["undo"] is None
    # The history still offers it: somebody may have taken their edit back.
    batch = next(b for b in page.get("history")["batches"] if b["name"] == "b.png")
    (folder / "b.txt").write_text("dog, window")
    assert page.post("undo", batch=batch["batch"]).json()["done"] == 1
    assert (folder / "b.txt").read_text() == "cat, window, morning light\n"


def test_what_a_killed_review_left_is_removed(serve, folder):
    for left in (
        folder / ".a.txt.8lb7nw8t.caption-train.tmp",
        folder / "sub/.a.txt.f46op9lx.caption-train.tmp",
    ):
        left.write_text("half a cap")
    serve(folder)
    assert not list(folder.rglob("*.tmp"))


def test_any_step_can_be_undone_not_the_last_alone(page, folder):
    page.save("a.png", "cat, sofa", "one")
    page.save("b.png", "cat, window, morning light", "two")
    older = page.get("history")["batches"][1]
    page.post("undo", batch=older["batch"])
    assert [(folder / f"{name}.txt").read_text() for name in "ab"] == ["cat, sofa\n", "two\n"]


def test_tags_are_completed_from_the_folder_with_counts(page):
    assert page.get("tags", prefix="")["tags"][0] == ["cat", 2]
    assert page.get("tags", prefix="wi")["tags"] == [["window", 1]]
    page.save("c.png", "", "winter")
    assert page.get("tags", prefix="wi")["tags"] == [["window", 1], ["winter", 1]]


def test_a_model_suggests_and_is_loaded_when_it_is_first_asked(serve, folder):
    family = FakeFamily()
    page = serve(folder, fake=family)
    assert page.get("state")["model"]["prompt"] == "say" and not family.loaded
    assert page.post("suggest", id=page.id_of("a.png")).json() == {"text": "say dark"}
    assert page.post("suggest", id=page.id_of("b.png"), prompt="tell", beams=3).json() == {
        "text": "tell white"
    }
    assert len(family.loaded) == 1
    tries = [
        page.post("suggest", id=page.id_of("a.png"), temperature=5.0, try_number=number).json()["text"]
        for number in range(12)
    ]
    assert len(set(tries)) > 1


@pytest.mark.parametrize(
    "values",
    [{"temperature": 1.0, "beams": 3}, {"beams": 0}, {"prompt": "refused"}, {"prompt": 3}]
    + [{"temperature": float("nan")}, {"temperature": -1}, {"beams": 10**30}, {"prompt": "x" * 30_000}],
)
def test_a_suggestion_that_cannot_be_made_is_one_line(serve, folder, values):
    page = serve(folder, fake=FakeFamily())
    answer = page.post("suggest", id=page.id_of("a.png"), **values)
    assert answer.status_code == 422 and "\n" not in answer.json()["error"]
    assert page.post("suggest", id=page.id_of("a.png")).json() == {"text": "say dark"}


def test_a_real_model_suggests_and_its_tokens_are_counted(serve, folder, tiny_base):
    from transformers import AutoTokenizer

    base = str(tiny_base("blip"))
    page = serve(folder, base_model=base, family="blip", device="cpu", max_token_length=5)
    first = page.post("suggest", id=page.id_of("a.png")).json()["text"]
    assert page.post("suggest", id=page.id_of("a.png")).json()["text"] == first
    tokenizer = AutoTokenizer.from_pretrained(base)
    counts = {
        name: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for name, text in CAPTIONS.items()
    }
    for limit in (0, counts["a.png"], counts["b.png"]):
        longer = [name for name, count in counts.items() if count > limit]
        assert names(page, longer_than=str(limit), unit="tokens") == longer
    assert len(set(counts.values())) > 2


def test_another_review_of_the_folder_is_noticed(serve, folder):
    first, second = serve(folder), serve(folder)
    second.save("a.png", "cat, sofa", "one", accept=True)
    assert first.post("refresh").json()["accepted"] == 1
    assert first.captions()["a.png"] == "one"
    first.post("undo")
    assert (folder / "a.txt").read_text() == "cat, sofa\n"


def test_a_damaged_image_gets_no_suggestion_and_no_picture(serve, folder):
    (folder / "d.png").write_bytes(b"no image")
    page = serve(folder, fake=FakeFamily())
    assert "d.png" in page.post("suggest", id=page.id_of("d.png")).json()["error"]
    assert page.client.get(f"/thumbnail/{page.id_of('d.png')}").status_code == 422


def test_pictures_are_jpegs_made_here_and_kept(page, tmp_path):
    for kind in ("thumbnail", "picture"):
        answer = page.client.get(f"/{kind}/{page.id_of('a.png')}")
        assert answer.headers["content-type"] == "image/jpeg" and answer.content[:2] == b"\xff\xd8"
    assert len(list((tmp_path / "cache/caption-train/thumbnails").glob("*.jpg"))) == 2
    assert page.client.get("/thumbnail/unknown").status_code == 404


def test_what_was_accepted_becomes_a_dataset_with_the_command_that_trains_on_it(page, folder, tmp_path):
    assert page.post("finish").status_code == 422
    for name in ("a.png", "sub/a copy.png"):
        page.save(name, CAPTIONS[name], CAPTIONS[name], accept=True)
    answer = page.post("finish").json()
    out = tmp_path / "photos-out"
    assert answer["count"] == 2 and f"--dataset_dir {out} " in answer["commands"][0]
    assert {pair.image.name: pair.caption for pair in read_dataset(out)} == {
        "a.png": "cat, sofa",
        "a copy.png": "a black cat",
    }
    page.post("mark", ids=[page.id_of("a.png")], accepted=False)
    page.post("finish")
    assert [pair.image.name for pair in read_dataset(out)] == ["a copy.png"]
    page.save("b.png", CAPTIONS["b.png"], "window", accept=True)
    (folder / "b.txt").write_text("written in an editor\n")
    page.post("finish")
    assert [pair.image.name for pair in read_dataset(out)] == ["a copy.png"]


def test_rows_of_a_metadata_file_are_edited_and_all_else_in_it_stays(serve, folder):
    rows = '{"file_name": "a.png", "text": "one", "n": 1.50}\n\n{"caption":"two","file_name":"b.png"}\n'
    (folder / "metadata.jsonl").write_text(rows)
    page = serve(folder)
    assert page.captions() == {"a.png": "one", "b.png": "two", "c.png": "", "sub/a copy.png": ""}
    page.save("a.png", "one", "new")
    page.save("c.png", "", "three")
    text = (folder / "metadata.jsonl").read_text()
    assert text == (
        '{"file_name": "a.png", "n": 1.50, "text": "new"}\n\n{"caption":"two","file_name":"b.png"}\n'
        '{"file_name": "c.png", "text": "three"}\n'
    )
    (folder / "metadata.jsonl").write_text(text.replace("two", "theirs"))
    assert page.save("b.png", "two", "mine").json()["conflict"]["theirs"] == "theirs"
    page.post("undo")
    page.post("undo")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines() if line]
    assert lines == [
        {"file_name": "a.png", "n": 1.5, "text": "one"},
        {"caption": "theirs", "file_name": "b.png"},
    ]
    assert (folder / "a.txt").read_text() == "cat, sofa\n"


def test_a_caption_that_two_images_share_stays_the_others(serve, folder):
    write_image(folder / "a.jpg", "blue", (40, 30))
    page = serve(folder)
    assert page.captions()["a.jpg"] == "cat, sofa"
    page.save("a.jpg", "cat, sofa", "blue")
    assert page.captions() | {"c.png": ""} == CAPTIONS | {"a.jpg": "blue"}
    assert page.save("a.png", "cat, sofa", "").status_code == 422
    page.post("undo")
    assert page.get("item", id=page.id_of("a.jpg"))["item"]["caption"] == "cat, sofa"


@pytest.mark.parametrize("text", ["a\0b", "x" * 1_000_001])
def test_what_no_caption_can_be_is_refused(page, folder, text):
    assert page.save("a.png", "cat, sofa", text).status_code == 422
    assert page.save("a.png", "cat, sofa", "half \ud83d").status_code == 422
    assert (folder / "a.txt").read_text() == "cat, sofa\n"


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"id": 1}', b'{"id": "x", "base": "", "text": ""}', b"[" * 100_000]
)
def test_a_request_that_makes_no_sense_is_one_line(page, body):
    answer = page.client.post("/api/save", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "\n" not in answer.json()["error"]


def test_ten_thousand_images_are_listed_and_filtered_in_pages(serve, tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    first = write_image(folder / "0.png", "red", (8, 8))
    for number in range(1, 10_000):
        (folder / f"{number}.png").hardlink_to(first)
        if number % 10 == 9:
            (folder / f"{number}.txt").write_text(f"caption {number}, tag\n")
    started = time.monotonic()
    page = serve(folder)
    opened = time.monotonic() - started
    ids = page.get("ids", state="empty")["ids"]
    assert len(ids) == 9_000
    assert len(page.get("items", ids=",".join(page.get("ids")["ids"][:250]))["items"]) == 200
    answer = page.post("preview", ids=page.get("ids")["ids"], find="tag", replace="label").json()
    assert (answer["count"], len(answer["changes"])) == (1_000, 200)
    started = time.monotonic()
    assert page.post("replace", preview=answer["preview"]).json()["done"] == 1_000
    replaced = time.monotonic() - started
    assert (folder / "9999.txt").read_text() == "caption 9999, label\n"
    with capsys.disabled():
        print(f"\n10,000 images: opened in {opened:.2f} s, 1,000 captions replaced in {replaced:.2f} s")
