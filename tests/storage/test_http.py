"""Files behind an HTTP server: an error is no absence."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shardprune.errors import InputError, StorageError
from shardprune.storage.folder import Folder
from shardprune.storage.retrying import ENVIRONMENT, preflight
from shardprune.storage.whole_files import read_file

# The answers to requests for a file: the last one stays.
ANSWERS = {
    "/x/there": [200],
    "/x/gone": [404],
    "/x/removed": [410],
    "/x/denied": [403],
    "/x/busy": [503, 503, 200],
    "/x/down": [503],
}


@pytest.fixture
def url(monkeypatch):
    """A folder of a server of this process; what does not answer is asked for as short as can be."""
    left = {path: list(answers) for path, answers in ANSWERS.items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/x/endless":
                self.send_response(200)
                self.end_headers()
                return
            answers = left[self.path]
            self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
            self.send_header("Content-Length", "5")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"words")

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    monkeypatch.setenv(ENVIRONMENT, "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x"
        server.shutdown()


def test_what_is_there_and_what_is_not(url):
    folder = Folder(url, "model")
    assert folder.size("there") == 5
    assert [folder.size(name) for name in ("gone", "removed")] == [None, None]


def test_what_is_there_soon_is_waited_for(url):
    assert Folder(url, "model").size("busy") == 5


def test_what_is_denied_is_an_error_and_not_an_absence(url):
    with pytest.raises(StorageError, match="^model: http://127.0.0.1:.*/x/denied cannot be read: 403"):
        Folder(url, "model").size("denied")


def test_a_server_that_does_not_say_how_large_a_file_is(url):
    with pytest.raises(StorageError, match="/x/endless cannot be read: its server does not say how large it is$"):
        Folder(url, "model").size("endless")


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "0")
    with (
        pytest.raises(InputError, match="^model: http://127.0.0.1:1/x/file cannot be read: Cannot connect"),
        preflight(),
    ):
        Folder("http://127.0.0.1:1/x", "model").size("file")


@pytest.mark.parametrize(("name", "answer"), [("denied", "403"), ("down", "503")])
def test_a_text_that_a_server_does_not_give_is_no_absence(url, name, answer):
    with pytest.raises(InputError, match=f"^eval: '{url}/{name}' cannot be read: {answer}"):
        read_file(f"{url}/{name}", "eval")
    with pytest.raises(InputError, match=f"^eval: '{url}/gone' does not exist"):
        read_file(f"{url}/gone", "eval")
