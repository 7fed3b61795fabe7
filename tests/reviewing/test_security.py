"""Who is answered: the page itself, in a browser that was let in; and no path leads out of the folder."""

import socket
import sys

import httpx
import pytest

from tests.fixtures.sample_set import write_image


def test_every_answer_has_the_headers_that_a_browser_needs(page):
    for path in ("/", "/static/app.js", "/api/state", "/nothing", f"/thumbnail/{page.id_of('a.png')}"):
        headers = page.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers and "server" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "192.168.0.9:{port}", ""]
)
def test_another_name_for_this_server_is_refused(page, host):
    headers = {"host": host.format(port=page.parts.access.port)}
    assert page.client.get("/", headers=headers).status_code in (400, 421)
    assert page.post("undo").status_code == 422
    assert page.client.post("/api/undo", json={}, headers=headers).status_code in (400, 421)


def test_the_names_of_this_machine_are_answered(page):
    for name in ("localhost", "127.0.0.1", "[::1]"):
        headers = {"host": f"{name}:{page.parts.access.port}"}
        assert page.client.get("/api/state", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"x-review-token": "wrong"}, 403),
        ({"x-review-token": "é".encode()}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_a_change_that_another_site_asks_for_is_refused(page, folder, headers, status):
    id = page.id_of("a.png")
    body = f'{{"id": "{id}", "base": "cat, sofa", "text": "forged"}}'
    headers = {"content-type": "application/json"} | headers
    assert page.client.post("/api/save", content=body, headers=headers).status_code == status
    assert (folder / "a.txt").read_text() == "cat, sofa\n"


@pytest.mark.parametrize("missing", ["origin", "x-review-token", "content-type"])
def test_a_change_without_what_the_page_sends_is_refused(page, folder, missing):
    headers = {"content-type": "application/json", **page.client.headers}
    del headers[missing]
    body = f'{{"id": "{page.id_of("a.png")}", "base": "cat, sofa", "text": "forged"}}'
    assert httpx.post(f"{page.address}/api/save", content=body, headers=headers).status_code in (403, 415)
    assert (folder / "a.txt").read_text() == "cat, sofa\n"


def test_other_methods_large_bodies_and_bodies_without_a_length_are_refused(page):
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        assert page.client.request(method, "/api/save").status_code == 405
    headers = {"content-type": "application/json"}
    assert page.client.post("/api/save", content=b" " * (17 << 20), headers=headers).status_code == 413
    assert page.client.post("/api/save", content=iter([b"{}"]), headers=headers).status_code == 411


def test_pictures_are_not_shown_on_other_sites(page):
    path = f"/thumbnail/{page.id_of('a.png')}"
    assert page.client.get(path, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    page_itself = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert page.client.get("/", headers=page_itself).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/thumbnail/../secret.png",
        "/thumbnail/..%2f..%2fsecret.png",
        "/thumbnail/%2e%2e%2fsecret.png",
        "/thumbnail/%252e%252e%252fsecret.png",
        "/picture/..%5c..%5csecret.png",
        "/picture//etc/passwd",
        "/picture/%00",
        "/static/../index.html",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/index.html",
    ],
)
def test_no_path_leads_out_of_the_folder(page, folder, path):
    write_image(folder.parent / "secret.png", "red", (9, 9))
    with socket.create_connection(("127.0.0.1", page.parts.access.port)) as connection:
        # By hand, because clients tidy paths.
        host = f"127.0.0.1:{page.parts.access.port}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.split()[1] in (b"404", b"400"), answer[:200]
    assert b"JFIF" not in answer and b"import" not in answer


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_that_lead_out_are_neither_read_nor_written(serve, folder):
    secret = folder.parent / "secret"
    secret.mkdir()
    write_image(secret / "x.png", "red", (9, 9))
    (secret / "x.txt").write_text("secret\n")
    (folder / "linked").symlink_to(secret)
    (folder / "x.png").symlink_to(secret / "x.png")
    write_image(folder / "y.png", "blue", (9, 9))
    (folder / "y.txt").symlink_to(secret / "x.txt")
    page = serve(folder)
    names = page.captions()
    assert "x.png" not in names and not any(name.startswith("linked") for name in names)
    assert names["y.png"] == "" and "leads out" in page.get("item", id=page.id_of("y.png"))["item"]["problem"]
    assert page.save("y.png", "", "mine").status_code == 422
    assert page.save("y.png", "secret", "mine").status_code == 422
    assert (secret / "x.txt").read_text() == "secret\n" and (folder / "y.txt").is_symlink()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_what_becomes_a_link_after_the_scan_is_not_followed(page, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    write_image(secret / "a copy.png", "green", (9, 9))
    (secret / "a copy.txt").write_text("a black cat\n")
    id = page.id_of("sub/a copy.png")
    (folder / "sub").rename(folder.parent / "away")
    (folder / "sub").symlink_to(secret)
    assert page.client.get(f"/thumbnail/{id}").status_code == 422
    assert page.save("sub/a copy.png", "a black cat", "mine").status_code == 422
    assert sorted(path.name for path in secret.iterdir()) == ["a copy.png", "a copy.txt"]
    assert (secret / "a copy.txt").read_text() == "a black cat\n"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_history_or_metadata_file_that_is_a_link_out_is_refused(folder, tmp_path):
    from caption_train.cli.commands import review_main

    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    for name in (".caption-train-review.jsonl", "metadata.jsonl"):
        (folder / name).symlink_to(victim)
        assert review_main([str(folder), "--port", "0"]) in (1, 2)
        (folder / name).unlink()
    assert victim.read_text() == "mine\n"


def test_other_machines_need_the_token_that_is_in_the_printed_address(serve, folder):
    page = serve(folder, host="0.0.0.0")
    access = page.parts.access
    path = access.address.partition(f":{access.port}")[2]
    assert path.startswith("/?token=") and len(access.entry_token) >= 32
    for refused in ("/", "/?token=", "/?token=wrong", "/api/state", f"/api/state?token={access.entry_token}"):
        assert page.client.get(refused).status_code == 401, refused
    assert page.post("undo").status_code == 401
    answer = page.client.get(path)
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and access.entry_token not in cookie
    assert page.client.get("/api/state").status_code == 200
    assert page.save("a.png", "cat, sofa", "new").status_code == 200
    headers = {"cookie": "caption-train-review=wrong"}
    assert httpx.get(f"{page.address}/api/state", headers=headers).status_code == 401


def test_an_address_of_this_machine_needs_no_token_another_does():
    from caption_train.reviewing.security import Access

    assert [Access.to(host, 1).entry_token is None for host in ("127.0.0.1", "::1", "localhost")] == [
        True
    ] * 3
    assert [Access.to(host, 1).entry_token is None for host in ("0.0.0.0", "::", "10.0.0.1")] == [False] * 3
    assert Access.to("::1", 7860).address == "http://[::1]:7860/"


def test_a_name_that_is_not_the_servers_is_refused_with_a_token_too():
    from caption_train.reviewing.security import Access

    access = Access.to("0.0.0.0", 7860)
    assert access.knows_host("192.168.0.9:7860") and access.knows_host(f"{socket.gethostname()}:7860")
    assert not access.knows_host("evil.example:7860") and not access.knows_host("192.168.0.9:7861")
