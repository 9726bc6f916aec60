import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import pytest

from headstart import downloads
from headstart.downloads import attempt, download, explain

CONTENT = os.urandom(1_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """A server of one file on this machine; what it does and what it was asked can be set and seen."""

    address: str = ""
    content: bytes = CONTENT
    break_after: list[int] = field(default_factory=list)  # bytes of each answer after which the connection ends
    ranges: bool = True
    shift: int = 0  # how far from the wanted byte it continues
    length: bool = True
    status: int = 200
    location: str = ""
    wait: float = 0.0
    asked: list[str] = field(default_factory=list)  # the Range of each request


@pytest.fixture
def server(monkeypatch):
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range", "")
            state.asked.append(wanted)
            time.sleep(state.wait)
            if state.status != 200 or state.location:
                self.send_response(302 if state.location else state.status)
                self.send_header("Location", state.location)
                self.end_headers()
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and state.ranges else 0
            if start >= len(state.content) and start:
                self.send_response(416)
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            start += state.shift if start else 0
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            if state.length:
                self.send_header("Content-Length", str(len(state.content) - start))
            self.end_headers()
            end = state.break_after.pop(0) if state.break_after else len(state.content)
            self.wfile.write(state.content[start : start + end])

        def log_message(self, *given):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.address = f"http://127.0.0.1:{running.server_port}/data.zip"
        yield state
        running.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "data.zip"


def beside(target):
    """What lies in the target's folder."""
    return sorted(path.name for path in target.parent.iterdir())


def test_a_file_is_downloaded_and_nothing_else_is_left(server, target):
    assert download(server.address, target, sha256=SHA256, md5=MD5, size=len(CONTENT)) == target
    assert target.read_bytes() == CONTENT and beside(target) == ["data.zip"]
    assert server.asked == [""]


@pytest.mark.parametrize(
    "checks", [{}, {"sha256": SHA256[:8]}, {"sha256": SHA256.upper()}, {"md5": MD5}, {"size": 1_000_000}]
)
def test_whatever_is_known_of_a_file_is_enough(server, target, checks):
    download(server.address, target, **checks)
    assert target.read_bytes() == CONTENT


def test_an_empty_file_is_a_file(server, target):
    server.content = b""
    assert download(server.address, target).read_bytes() == b""


def test_progress_is_shown_in_blocks_and_bytes(server, target):
    seen = []

    def track(blocks, total):
        for number, block in enumerate(blocks, 1):
            seen.append((number, total, block.received, block.size))
            yield block

    download(server.address, target, track=track)
    numbers, totals, received, sizes = zip(*seen, strict=True)
    assert numbers == tuple(range(1, totals[0] + 1)) and set(totals) == {4}
    assert list(received) == sorted(received) and received[-1] == len(CONTENT) and set(sizes) == {len(CONTENT)}


def test_progress_of_a_continued_file_counts_what_is_still_to_come(server, target):
    server.break_after = [600_000]
    totals, first = [], []

    def track(blocks, total):
        totals.append(total)
        for number, block in enumerate(blocks):
            if number == 0:
                first.append(block.received - len(block.content))
            yield block

    download(server.address, target, sha256=SHA256, track=track)
    assert totals == [4, 2] and first[0] == 0 and 500_000 < first[1] <= 600_000


def test_where_no_size_is_told_nothing_is_shown_and_the_file_comes_all_the_same(server, target):
    server.length = False

    def track(blocks, total):
        raise AssertionError("there is no total")

    assert download(server.address, target, sha256=SHA256, track=track).read_bytes() == CONTENT


# Continuing


def test_a_connection_that_breaks_is_continued_where_it_broke(server, target):
    server.break_after = [300_000]
    download(server.address, target, sha256=SHA256, size=len(CONTENT))
    assert target.read_bytes() == CONTENT and beside(target) == ["data.zip"]
    assert server.asked[0] == "" and re.fullmatch(r"bytes=[1-9]\d+-", server.asked[1])


def test_what_arrived_is_kept_for_another_call(server, target):
    server.break_after = [300_000, 300_000]
    with pytest.raises(OSError, match=r"broke off after [\d,]+ of 1,000,000 bytes"):
        download(server.address, target, sha256=SHA256)
    assert beside(target) == [".data.zip.partial"]
    kept = (target.parent / ".data.zip.partial").stat().st_size
    assert kept > 500_000
    download(server.address, target, sha256=SHA256)
    assert target.read_bytes() == CONTENT and server.asked[-1] == f"bytes={kept}-"


def test_without_a_checksum_nothing_is_continued_or_kept(server, target):
    server.break_after = [300_000, 300_000]
    with pytest.raises(OSError, match="broke off"):
        download(server.address, target)
    assert server.asked == ["", ""] and beside(target) == []


def test_a_server_that_cannot_continue_begins_again(server, target):
    server.ranges, server.break_after = False, [300_000]
    download(server.address, target, sha256=SHA256)
    assert target.read_bytes() == CONTENT and len(server.asked) == 2


def test_a_server_that_continues_elsewhere_is_noticed(server, target):
    server.shift, server.break_after = -1, [300_000]
    with pytest.raises(OSError, match=r"continued at byte \d+ instead of \d+"):
        download(server.address, target, sha256=SHA256)
    assert not target.exists()


def test_a_part_of_another_file_is_noticed_and_the_file_comes_anew(server, target):
    target.parent.mkdir()
    (target.parent / ".data.zip.partial").write_bytes(os.urandom(5000))
    download(server.address, target, sha256=SHA256, size=len(CONTENT))
    assert target.read_bytes() == CONTENT and server.asked == ["bytes=5000-", ""]


@pytest.mark.parametrize("size", [None, 1_000_000])
def test_a_part_that_is_longer_than_the_file_is_given_up(server, target, size):
    target.parent.mkdir()
    (target.parent / ".data.zip.partial").write_bytes(bytes(2_000_000))
    download(server.address, target, sha256=SHA256, size=size)
    assert target.read_bytes() == CONTENT


def test_a_part_that_is_whole_already_needs_no_connection(target):
    target.parent.mkdir()
    (target.parent / ".data.zip.partial").write_bytes(CONTENT)
    download("http://127.0.0.1:1/nobody-listens", target, sha256=SHA256, size=len(CONTENT))
    assert target.read_bytes() == CONTENT and beside(target) == ["data.zip"]


def test_a_kill_leaves_a_part_and_never_a_half_file(server, target):
    server.wait, code = (
        0.0,
        (
            "import sys, time\n"
            "from pathlib import Path\n"
            "from headstart.downloads import download\n"
            "def slowly(blocks, total):\n"
            "    for number, block in enumerate(blocks):\n"
            "        yield block\n"
            "        if number == 1:\n"
            "            print('now', flush=True); time.sleep(60)\n"
            "download(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3], track=slowly)\n"
        ),
    )
    server.content = content = os.urandom(20_000_000)
    sha256 = hashlib.sha256(content).hexdigest()
    command = [sys.executable, "-c", code, server.address, str(target), sha256]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.kill()
    assert not target.exists()
    kept = (target.parent / ".data.zip.partial").stat().st_size
    assert 0 < kept < len(content)
    download(server.address, target, sha256=sha256)
    assert target.read_bytes() == content and server.asked == ["", f"bytes={kept}-"]


# What is wrong


@pytest.mark.parametrize("checks", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"sha256": SHA256, "md5": "1" * 32}])
def test_a_wrong_checksum_leaves_nothing_under_the_name(server, target, checks):
    # The mistake: a downloaded archive without a checksum.
    with pytest.raises(OSError, match="checksum"):
        download(server.address, target, **checks)
    assert beside(target) == [] and server.asked == ["", ""]


def test_another_size_is_noticed_before_anything_is_written(server, target):
    with pytest.raises(OSError, match="has 1,000,000 bytes instead of 999,999"):
        download(server.address, target, sha256=SHA256, size=999_999)
    assert beside(target) == []


def test_an_endless_answer_is_ended(server, target):
    server.length, server.content = False, bytes(5_000_000)
    with pytest.raises(OSError, match="sent more than 1,000,000 bytes"):
        attempt(server.address, target, sha256=SHA256, size=1_000_000)
    assert not target.exists()


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_what_the_server_says_is_the_reason_after_one_retry(server, target, status):
    server.status = status
    with pytest.raises(OSError, match=f"the server says {status} .+"):
        download(server.address, target)
    assert len(server.asked) == 2 and beside(target) == []


def test_a_server_that_keeps_silent_is_given_up_after_the_time_out(server, target, monkeypatch):
    assert downloads.TIMEOUT_SECONDS == 10.0
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 0.1)
    server.wait = 0.5
    start = time.perf_counter()
    with pytest.raises(OSError, match="timed out"):
        download(server.address, target)
    assert time.perf_counter() - start < 5 and len(server.asked) == 2


def test_nobody_listening_is_the_reason(target):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/data.zip"
    with pytest.raises(OSError) as caught:
        download(address, target)
    assert explain(caught.value) == "Connection refused"


def test_the_second_attempt_counts(server, target, monkeypatch):
    connect, failed = urllib.request.urlopen, []

    def fail_once(*given, **named):
        if not failed:
            failed.append(True)
            raise urllib.error.URLError(TimeoutError("timed out"))
        return connect(*given, **named)

    monkeypatch.setattr(urllib.request, "urlopen", fail_once)
    assert download(server.address, target).read_bytes() == CONTENT


def test_one_attempt_is_one(server, target):
    server.status = 404
    with pytest.raises(OSError, match="404"):
        attempt(server.address, target)
    assert len(server.asked) == 1


@pytest.mark.parametrize("reason", [OSError(), TimeoutError(), urllib.error.URLError(""), OSError("two\nlines")])
def test_a_reason_is_one_line_and_never_empty(reason):
    assert explain(reason) and "\n" not in explain(reason)


# Where it comes from and goes to


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://example.org/x", "data:,x", "/etc/passwd", "x"])
def test_only_http_is_spoken(target, address):
    with pytest.raises(OSError, match="is refused: it is not http or https"):
        attempt(address, target)
    assert not target.exists()


def test_a_redirection_is_followed(server, target, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:

        class Redirects(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(301)
                self.send_header("Location", server.address)
                self.end_headers()

            def log_message(self, *given):
                pass

        other.RequestHandlerClass = Redirects
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert download(f"http://127.0.0.1:{other.server_port}/x", target).read_bytes() == CONTENT
        finally:
            other.shutdown()
            thread.join()


@pytest.mark.parametrize("location", ["file:///etc/passwd", "gopher://example.org/x"])
def test_a_redirection_away_from_http_is_refused(server, target, location):
    server.location = location
    with pytest.raises(OSError):
        attempt(server.address, target)
    assert beside(target) == []


@pytest.mark.parametrize(
    ("asked", "final", "allowed"),
    [
        ("https://a.org/x", "https://b.org/x", True),
        ("http://a.org/x", "https://a.org/x", True),
        ("https://a.org/x", "http://a.org/x", False),
        ("https://a.org/x", "ftp://a.org/x", False),
        ("http://a.org/x", "ftp://a.org/x", False),
    ],
)
def test_a_secured_connection_is_not_led_away_from(target, monkeypatch, asked, final, allowed):
    class Answer:
        status, url, headers = 200, final, {}
        contents, closed = (b"content",), False

        def __enter__(self):
            return self

        def __exit__(self, *given):
            self.close()

        def close(self):
            type(self).closed = True

        def read(self, count):
            assert allowed, "read before the address was looked at"
            content, self.contents = b"".join(self.contents), ()
            return content

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: Answer())
    if allowed:
        assert attempt(asked, target).read_bytes() == b"content"
    else:
        with pytest.raises(OSError, match="is refused"):
            attempt(asked, target)
        assert not target.exists() and Answer.closed


def test_a_file_that_is_there_is_checked_and_not_downloaded(target):
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    nowhere = "http://127.0.0.1:1/nobody-listens"
    assert download(nowhere, target, sha256=SHA256, size=len(CONTENT)) == target
    for checks in ({"sha256": "0" * 64}, {"size": 5}):
        with pytest.raises(OSError, match=r"data\.zip"):
            download(nowhere, target, **checks)
        assert target.read_bytes() == CONTENT  # somebody laid it there


def test_a_folder_that_cannot_be_made_is_the_reason(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        download(server.address, tmp_path / "file" / "data.zip")
    assert server.asked == []


def test_of_two_at_once_one_downloads_and_the_other_gets_the_file(server, target):
    server.wait = 0.5
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(download(server.address, target, sha256=SHA256))) for _ in "12"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [target, target] and target.read_bytes() == CONTENT
    assert server.asked == [""] and beside(target) == ["data.zip"]


def test_whoever_does_not_wait_is_told_that_another_is_at_it(tmp_path):
    with (
        downloads.alone(tmp_path / "x"),
        pytest.raises(BlockingIOError, match="another process"),
        downloads.alone(tmp_path / "x", wait=False),
    ):
        raise AssertionError("two at once")
    with downloads.alone(tmp_path / "x", wait=False):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
