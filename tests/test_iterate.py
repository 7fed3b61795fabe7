"""The round of docs/iterate.md, each command as it stands there, on a handful of the sample set's images."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import time

import httpx
import pytest

from caption_train.cli.commands import review_main
from tests.fixtures.forked import start
from tests.fixtures.paths import REPOSITORY
from tests.test_docs import MAINS, find_script, read_commands

PAGE = REPOSITORY / "docs/iterate.md"
SAMPLES = REPOSITORY / "examples/shapes"
TRIGGER = "shpx, "
REVIEW = "review_captions.py"
# Another port than the page's, which may be taken here, and a CPU for everybody.
CHANGES = {REVIEW: ["--port", "0"]}
ADDED = {"train_florence_lora.py": ["--device", "cpu", "--num_workers", "0"]}
SECONDS = 120


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone of the repository, with 12 and 16 images of the sample set."""
    pytest.importorskip(
        "starlette", reason="the review page's extra is not installed: pip install '.[review]'"
    )
    for part, count in (("train", 12), ("heldout", 16)):
        folder = tmp_path / "examples/shapes" / part
        folder.mkdir(parents=True)
        for caption in sorted((SAMPLES / part).glob("*.txt"))[:count]:
            for path in (SAMPLES / part).glob(f"{caption.stem}.*"):
                shutil.copy(path, folder)
    (tmp_path / "examples/bases").symlink_to(REPOSITORY / "examples/bases")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def run(script, arguments):
    assert MAINS[script]([*arguments, *ADDED.get(script, [])]) == 0, (script, arguments)


def review(arguments, log):
    """Review as a person would: look at each suggestion, put the trigger word right, accept all, Ctrl-C.

    Returns:
        The command that it ends with, as words.
    """
    child = start(lambda: exit(review_main([*arguments, *CHANGES[REVIEW]])), log)
    try:
        address = wait_for(r"^Review 9 images .* at (http://\S+?)/?$", log)
        token = re.search('page-token" content="([^"]+)"', httpx.get(f"{address}/").text)[1]
        headers = {"origin": address, "x-review-token": token}
        with httpx.Client(base_url=f"{address}/api/", headers=headers, timeout=SECONDS) as client:
            correct(client)
        child.kill(signal.SIGINT)
        assert child.wait() == 0, log.read_text()
    finally:
        # Already gone, unless something above failed.
        subprocess.run(["kill", "-9", str(child.process_id)], check=False, stderr=subprocess.DEVNULL)
    said = log.read_text()
    assert "Traceback" not in said and "9 accepted" in said
    return shlex.split(said.rpartition("Next:\n")[2].strip().splitlines()[0])


def correct(client):
    def ask(call, **values):
        answer = client.post(call, json=values)
        assert answer.status_code == 200, answer.text
        return answer.json()

    ids = client.get("ids").json()["ids"]
    items = client.get("items", params={"ids": ",".join(ids)}).json()["items"]
    assert len(items) == 9 and all(item["caption"] for item in items)
    suggested = ask("suggest", id=ids[0])
    assert suggested["text"] == items[0]["caption"]
    for item in items:
        text = TRIGGER + item["caption"]
        ask("save", id=item["id"], base=item["caption"], text=text)
    ask("mark", ids=ids, accepted=True)


def wait_for(pattern, log):
    end = time.monotonic() + SECONDS
    while not (found := re.search(pattern, log.read_text() if log.exists() else "", re.MULTILINE)):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    return found[1]


def test_the_round_goes_from_captions_to_a_report_of_a_better_lora(clone):
    commands, scripts, printed = read_commands(PAGE), [], None
    for words in commands:
        found = find_script(words)
        if found is None:
            # With a shell, for its file names with stars.
            subprocess.run(" ".join(words), shell=True, check=True)
            continue
        script, arguments = found
        scripts.append(script)
        if script == REVIEW:
            printed = review(arguments, clone / "review.log")
        else:
            run(script, arguments)
    assert scripts == [
        *("train_florence_lora.py", "inference_florence.py", REVIEW, "compile_captions.py"),
        *("train_florence_lora.py", "evaluate_captions.py"),
    ]

    # The command that the review ended with is the page's, and works.
    assert shlex.join(printed) in PAGE.read_text("utf-8")
    run(*find_script([*printed, "--epochs", "1"]))
    record = json.loads((clone / "loras/photos-accepted/training.json").read_text())
    assert record["options"]["init_adapter"] == "round/lora-1"

    rows = [json.loads(line) for line in (clone / "round/photos-accepted/metadata.jsonl").open()]
    assert {row["split"] for row in rows} == {"train", "validation"}
    assert len(rows) == 9 and all(row["text"].startswith(TRIGGER) for row in rows)
    assert json.loads((clone / "round/lora-2/training.json").read_text())["options"]["rank"] == 8
    assert "before training" in (clone / "round/lora-2/report.html").read_text()
    evaluation = json.loads((clone / "round/evaluation/evaluation.json").read_text())
    assert [model["name"] for model in evaluation["models"]] == ["base", "lora-1", "lora-2"]
    assert evaluation["images"] == 7
    assert (clone / "round/evaluation/report.html").stat().st_size > 10_000
