"""Captions from a served model: a small real HTTP server that answers well, slowly, wrongly, not at all."""

import base64
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from caption_train.captioning.engines import chat_api
from caption_train.captioning.engines.chat_api import complete_url, read_answer
from caption_train.cli.commands import caption_main
from caption_train.errors import UsageError
from tests.fixtures.shards import read_tar, write_tar

KEY = "sk-secret-of-the-test"


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `script`, the last one for ever; notes what it was asked.

    An item is a status and a body, or a function of the handler.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.headers_seen = [answer], [], []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.headers_seen.append(dict(self.headers))
            step = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            reply = step(self) if callable(step) else step
            if reply is not None:
                self.reply(*reply)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, status, body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def make_answer(text, finish="stop"):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def answer(handler):
    """Name the colour of the picture in the request's middle."""
    url = handler.server.asked[-1]["messages"][-1]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    pixel = image.getpixel((image.width // 2, image.height // 2))
    return make_answer(f" {'red' if pixel[0] > 128 else 'blue'} of {image.width}\n")


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(chat_api, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(chat_api, "LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("CAPTION_TRAIN_API_KEY", raising=False)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, (colour, width) in enumerate([("red", 40), ("blue", 50), ("red", 60), ("blue", 70)]):
        Image.new("RGB", (width, 30), colour).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def run(server, photos, capsys):
    """`run("--retries", "0")`: exit code, stdout and stderr of captioning the photos through the server."""

    def caption(*flags, url=None, images=photos):
        common = ["--images", images, "--endpoint", url or server.url, "--model", "captioner"]
        common += ["--retries", "2", "--timeout", "5", "--concurrency", "1"]
        code = caption_main("vlm", [*map(str, common), *map(str, flags)])
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        return code, said.out, said.err

    return caption


def test_captions_come_in_order_with_our_prompt_and_image(run, server, photos):
    code, out, err = run(
        "--prompt", "What colour?", "--system_prompt", "Be brief.", "--max_token_length", "9"
    )
    assert code == 0
    assert [line.partition(": ")[2] for line in out.splitlines()] == [
        *("red of 40", "blue of 50", "red of 60", "blue of 70")
    ]
    body = server.asked[0]
    assert body["model"] == "captioner" and body["max_tokens"] == 9 and body["temperature"] == 0
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    image, text = body["messages"][1]["content"]
    assert image["type"] == "image_url" and text == {"type": "text", "text": "What colour?"}
    assert "Authorization" not in server.headers_seen[0]
    assert f"with captioner at {server.url}/v1/chat/completions" in err


def test_a_server_captions_shards_and_after_it_was_away_goes_on(run, server, photos, tmp_path):
    members = [(f"{n}.png", (photos / f"{n}.png").read_bytes()) for n in range(4)]
    write_tar(tmp_path / "a.tar", members)
    flags = ("--output_shards", tmp_path / "out", "--retries", "0")
    server.script = [answer, (503, {})]
    code, _, err = run(*flags, images=tmp_path / "a.tar")
    assert code == 1 and "in a row got no answer: the server answers 503" in err
    server.script, server.asked = [answer], []
    code, _, err = run(*flags, images=tmp_path / "a.tar")
    assert code == 0 and len(server.asked) == 3
    assert "Captioning 1 shard with captioner at http://" in err
    said = [text for name, text in read_tar(tmp_path / "out/a.tar") if name.endswith(".txt")]
    assert said == [b"red of 40\n", b"blue of 50\n", b"red of 60\n", b"blue of 70\n"]


def test_captions_are_kept_and_appended_as_with_a_model_loaded_here(run, server, photos, tmp_path):
    (photos / "1.txt").write_text("by hand\n")
    assert run("--save_captions")[0] == 0
    assert len(server.asked) == 3
    assert (photos / "1.txt").read_text() == "by hand\n" and (photos / "0.txt").read_text() == "red of 40\n"
    assert run("--output", tmp_path / "all.jsonl", "--trigger", "zwx")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert rows[0]["text"] == "zwx, red of 40"


def test_images_are_made_no_larger_than_asked(run, photos):
    Image.new("RGB", (4000, 3000), "red").save(photos / "9.png")
    assert run("--max_pixels", "10000")[1].splitlines()[-1].endswith("red of 115")


def test_requests_under_way_are_bounded(run, server):
    def slowly(handler):
        time.sleep(0.2)
        return answer(handler)

    server.script = [slowly]
    assert run("--concurrency", "3")[0] == 0
    assert server.most <= 3 and server.most > 1


def test_the_key_comes_from_the_environment(run, server, monkeypatch):
    monkeypatch.setenv("CAPTION_TRAIN_API_KEY", KEY)
    assert run()[0] == 0
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"


def test_a_server_that_repeats_the_key_does_not_make_us_print_it(run, server, monkeypatch):
    monkeypatch.setenv("CAPTION_TRAIN_API_KEY", KEY)
    server.script = [(400, {"error": {"message": f"bad request by {KEY}"}})]
    code, _, err = run()
    assert code == 1 and "the server answers 400: bad request by ***" in err


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (None, "wants a key: put it into CAPTION_TRAIN_API_KEY"),
        (KEY, "does not take the key in CAPTION_TRAIN"),
    ],
)
def test_a_wrong_key_ends_the_run_at_once(run, server, monkeypatch, key, words):
    if key:
        monkeypatch.setenv("CAPTION_TRAIN_API_KEY", key)
    server.script = [(401, {"error": "no"})]
    code, _, err = run()
    assert code == 1 and words in err and len(server.asked) == 1


def test_an_unknown_model_ends_the_run_with_what_the_server_says(run, server):
    server.script = [(404, {"object": "error", "message": "The model `captioner` does not exist."})]
    code, _, err = run()
    assert code == 1 and "--model captioner: the server answers 404: The model `captioner` does not" in err


def test_no_redirect_is_followed(run, server):
    server.script = [lambda handler: handler.reply(307, {}, Location="http://127.0.0.1:9/elsewhere")]
    code, _, err = run()
    assert code == 1 and "the server answers 307" in err


@pytest.mark.parametrize(
    "bad",
    [
        (503, {"error": {"message": "loading model"}}),
        (429, {"error": "slow down"}),
        (200, b"<html>gateway</html>"),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": None}}]}),
        lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    ],
)
def test_what_may_pass_is_tried_again(run, server, bad):
    server.script = [bad, bad, answer]
    code, out, _ = run()
    assert code == 0 and out.splitlines()[0].endswith("red of 40")
    assert len(server.asked) == 6


def test_a_busy_server_is_given_the_time_it_asks_for(run, server, monkeypatch):
    monkeypatch.setattr(chat_api, "LONGEST_PAUSE", 5.0)
    server.script = [lambda handler: handler.reply(429, {}, Retry_After="0.5"), answer]
    start = time.monotonic()
    assert run()[0] == 0
    assert time.monotonic() - start > 0.35


def test_one_refused_image_does_not_end_a_folder(run, server):
    server.script = [answer, (400, {"error": {"message": "image too odd"}}), answer]
    code, out, err = run()
    assert code == 1 and len(out.splitlines()) == 3
    assert "1.png: the server answers 400: image too odd" in err


def test_one_image_without_an_answer_does_not_end_a_folder(run, server):
    broken = (500, {"error": "out of memory"})
    server.script = [answer, broken, broken, broken, answer]
    code, out, err = run()
    assert code == 1 and len(out.splitlines()) == 3
    assert "1.png: the server answers 500: out of memory (3 tries)" in err


def test_a_server_that_answers_wrongly_every_time_ends_the_run(run, server, photos):
    server.script = [answer, (200, b"no json")]
    code, _, err = run("--save_captions")
    assert code == 1 and (photos / "0.txt").is_file()
    assert "3 in a row got no answer: the answer is none:" in err and "Traceback" not in err


def test_a_server_that_is_not_there_is_one_line(run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, _, err = run(url=url)
    assert code == 1 and "no connection: Connection refused (3 tries)" in err.splitlines()[-1]


def test_a_server_that_never_answers_is_not_waited_for(run, server):
    server.script = [lambda handler: time.sleep(3)]
    start = time.monotonic()
    code, _, err = run("--timeout", "0.2", "--retries", "1", "--concurrency", "2")
    assert code == 1 and time.monotonic() - start < 5
    assert "no answer within 0.2 s (--timeout) (2 tries)" in err


def test_a_server_that_drips_is_not_waited_for(run, server):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)

    server.script = [drip]
    start = time.monotonic()
    code, _, err = run("--timeout", "0.5", "--retries", "0")
    assert code == 1 and time.monotonic() - start < 6
    assert "no answer within 0.5 s" in err


def test_a_server_that_knows_no_template_settings_is_asked_without(run, server):
    objection = (400, {"error": {"message": "Unrecognized request argument: chat_template_kwargs"}})
    server.script = [objection, answer]
    assert run()[0] == 0
    assert "chat_template_kwargs" in server.asked[0]
    assert not [body for body in server.asked[1:] if "chat_template_kwargs" in body]


def test_a_caption_that_was_cut_is_counted(run, server):
    server.script = [make_answer("half a", finish="length")]
    assert "reached the token limit" in run()[2]


def test_a_lora_brings_its_prompt_and_settings(run, server, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    record = {"family": "vlm", "prompt": "tags", "settings": {"system_prompt": "Brief.", "max_pixels": 900}}
    (folder / "training.json").write_text(json.dumps(record))
    assert run("--peft_model", folder)[0] == 0
    messages = server.asked[0]["messages"]
    assert messages[0]["content"] == "Brief." and messages[1]["content"][1]["text"] == "tags"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--endpoint", "http://x"], "--endpoint needs --model"),
        (["--model", "x"], "give --endpoint too"),
        (["--endpoint", "http://x", "--model", "y", "--beams", "2"], "--beams is for models loaded here"),
        (["--endpoint", "localhost:8000", "--model", "y"], "is no URL such as"),
        (["--endpoint", "http://user:pass@x", "--model", "y"], "leave the key out of the URL"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(photos, capsys, flags, words):
    assert caption_main("vlm", ["--images", str(photos), *flags]) == 2
    assert words in capsys.readouterr().err


def test_families_that_cannot_be_served_have_no_such_flag(photos, capsys):
    assert caption_main("blip", ["--images", str(photos), "--endpoint", "http://x", "--model", "y"]) == 2
    assert "unrecognized arguments: --endpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"]
)
def test_the_address_may_be_given_in_part(url):
    assert complete_url(url) == "http://h:1/v1/chat/completions"


def test_other_paths_are_kept():
    assert complete_url("https://h/openai/v4?x=1") == "https://h/openai/v4/chat/completions?x=1"
    with pytest.raises(UsageError):
        complete_url("ftp://h")


def test_an_answer_is_its_text():
    assert read_answer(json.dumps(make_answer(" a cat\n")[1]).encode()).text == "a cat"


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}é€"])
def test_a_key_that_no_header_holds_is_refused_without_showing_it(run, monkeypatch, key):
    monkeypatch.setenv("CAPTION_TRAIN_API_KEY", key)
    code, _, err = run()
    assert code == 2 and "CAPTION_TRAIN_API_KEY holds characters that no key has" in err


def test_a_key_read_from_a_file_may_end_with_a_line_break(run, server, monkeypatch):
    monkeypatch.setenv("CAPTION_TRAIN_API_KEY", f" {KEY}\r\n")
    server.script = [answer]
    assert run()[0] == 0
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "bad", [b"[" * 200_000, b'{"choices": ' * 100_000, b"1" * 100_000, b'{"choices": [' + b"9" * 9000 + b"]}"]
)
def test_an_answer_that_no_parser_likes_is_one_of_one_image(run, server, bad):
    server.script = [(200, bad), (200, bad), (200, bad), answer]
    code, out, err = run()
    assert code == 1 and len(out.splitlines()) == 3
    assert err.count("the answer is none") == 1 and "Traceback" not in err


def test_what_no_caption_file_can_hold_is_left_out_of_an_answer(run, server, photos):
    server.script = [make_answer("a \ud83d cat\x00"), answer]
    code, _, err = run("--save_captions")
    assert code == 0, err
    assert (photos / "0.txt").read_text("utf-8").startswith("a ")
