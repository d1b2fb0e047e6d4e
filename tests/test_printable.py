"""Text that is safe to print."""

import pickle
import random
import string
import unicodedata

import pytest

from shardprune.errors import InputError, OutOfMemory, StorageError, WorkerLost, first_line
from shardprune.printable import LONGEST, message, printable, without_credentials, without_folders

ALPHABET = string.ascii_letters + string.digits + "/'\"@:?#%&=+;,.!()[]{}<>|\\~^$-_*`"
SCHEMES = ("s3", "gs", "https", "hf", "simplecache::s3", "git+ssh")


def _password(source, letters=ALPHABET):
    return source.choice(string.ascii_letters) + "".join(source.choices(letters, k=source.randint(7, 40)))


def test_no_password_of_a_url_survives():
    source = random.Random(0)
    for _ in range(1000):
        password, scheme, user = _password(source), source.choice(SCHEMES), source.choice(("", "key", "AKIA7+x"))
        url = f"{scheme}://{user}:{password}@bucket/folder/model"
        for text in (url, f"{url} cannot be read", f"out: {url!r} is full, see {url}", f'{{"model":"{url}"}} at 7 s'):
            kept = without_credentials(text)
            assert password not in kept, text
            assert repr(password)[1:-1] not in kept, text
            assert "bucket/folder/model" in kept


def test_no_password_of_a_value_survives_with_white_space_in_it():
    source = random.Random(1)
    for _ in range(500):
        password = "".join(source.choices(ALPHABET + " \t\n", k=source.randint(4, 30)))
        assert without_credentials(f"s3://key:{password}@bucket/model") == "s3://bucket/model"
        worded = _password(source, ALPHABET + " ").replace("@ ", "@")
        assert worded not in without_credentials(f"cannot read 's3://key:{worded}@bucket/model'")


def test_no_query_survives():
    source = random.Random(2)
    for _ in range(500):
        secret = _password(source, ALPHABET.replace("?", "")) + "x"
        kept = without_credentials(f"model: 'https://host/file?X-Signature={secret}' cannot be read")
        assert secret not in kept
        assert kept.endswith("' cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/name@main/file.json is missing",
        "s3://bucket/day@noon/model",
        "no worker answers at ray://10.0.0.1:10001: write to a@b.c",
        "as http://[::1]:8080/status says, me@home",
        "file:///data/model and memory://x",
    ],
)
def test_urls_without_credentials_stay(text):
    assert without_credentials(text) == text


def test_text_without_urls_stays():
    source = random.Random(3)
    for _ in range(500):
        text = "".join(source.choices(ALPHABET + " \n\té€", k=60)).replace("://", "")
        assert without_credentials(text) == text


@pytest.mark.parametrize(
    "piece", ["a://", "a://b:c ", "a://b:c@", "a@b", "'a://b?", "\\'x://k:s", ":/", "w", "/", "'/"]
)
def test_long_texts_take_no_longer_than_their_length(piece):
    # A way that looks at the rest of the text from every URL of it would take minutes here.
    text = piece * (300_000 // len(piece))
    assert "secret" not in without_credentials(f"{text}s3://key:secret@bucket")
    assert len(without_folders(text)) <= 2 * len(text)


def test_everything_printable_is_kept_and_nothing_else():
    for code in (*range(0x3100), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10400), *range(0xE0000, 0xE0080)):
        shown = printable(letter := chr(code))
        assert shown.isprintable(), f"U+{code:04X}"
        if unicodedata.category(letter)[0] in "LMNPS":
            assert shown == letter


def test_escapes_overrides_and_lines_are_replaced():
    assert printable("a\x1b[31m\x9bb\u202ec\ud800") == r"a\x1b[31m\x9bb\u202ec\ud800"
    assert message("one\r\n  two\u2028three\tfour") == "one two three four"


def test_a_long_text_loses_its_middle():
    shown = message(f"value {'x' * 10**6} is not allowed; use 1 or 2")
    assert len(shown) == LONGEST
    assert shown.startswith("value xxx")
    assert shown.endswith("xxx is not allowed; use 1 or 2")


def test_paths_lose_their_folders():
    text = "lost '/tmp/ray/session_1/logs/worker.out': see /home/a/b/c.txt, s3://bucket/a/b and a/b"
    assert without_folders(text) == "lost '.../worker.out': see .../c.txt, s3://bucket/a/b and a/b"


@pytest.mark.parametrize("kind", [WorkerLost, OutOfMemory])
def test_errors_are_messages(kind):
    error = kind("worker\x1b]0;x\x07 at ray://me:se/cret@head:10001\nis gone")
    assert str(error) == r"worker\x1b]0;x\x07 at ray://head:10001 is gone"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("kind", [InputError, StorageError])
def test_errors_about_fields_are_messages(kind):
    error = kind("out\n", "'s3://key:a'b@c@bucket' cannot\x00be read\n")
    assert (error.field, error.problem) == ("out", r"'s3://bucket' cannot\x00be read")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == f"out: {error.problem}"


def test_the_first_line_of_an_error_has_its_reason():
    assert first_line(ValueError("\nValidation error for field 'hidden_size':\n    must be int\nmore")) == (
        "Validation error for field 'hidden_size': must be int"
    )
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
