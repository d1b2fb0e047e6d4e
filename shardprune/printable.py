"""Text that is safe to print: without credentials, control characters, or more of it than a reader wants.

What is printed holds words of others: names in a checkpoint, lines of an event log, messages of a storage's client.
"""

import re

LONGEST = 1000  # characters of a message; values stand at its beginning, what is allowed at its end
OMITTED = " [...] "

_SPACE = re.compile(r"\s")
_SCHEME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+.-"
_PORT = re.compile(r"[^:]*(\[[0-9A-Fa-f:.]*\])?:\d*")  # a host and its port, where a user and a password might stand
_AFTER = "'\"`,;:.!)]}>"  # ends a sentence or a quotation rather than a URL
_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:~|/)[^\s'\":;,()]*/")


def printable(text: str, longest: int | None = LONGEST) -> str:
    """Return a text as one line that a terminal and a page show as it is.

    White space becomes spaces, other characters that do not print (of terminals' escapes, of right-to-left overrides,
    halves of surrogate pairs) become escapes such as `\\x1b`. A longer text than `longest` characters loses its middle.
    """
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)
    if longest is None or len(text) <= longest:
        return text
    kept = longest - len(OMITTED)
    return text[: kept * 2 // 3] + OMITTED + text[len(text) - (kept - kept * 2 // 3) :]


def message(text: str) -> str:
    """Return a text as a message of one line: words with single spaces between them, printable, without credentials."""
    return printable(" ".join(without_credentials(text).split()))


def without_credentials(text: str) -> str:
    """Remove user names, passwords and query strings from the URLs in a text, in time linear in its length.

    A user's part may hold any character that a password can, also `/`, quotes and `@`: it ends at the last `@` of the
    URL. A URL ends at white space, or if a password seems to go on behind that, at the white space after the next `@`;
    a text that is one URL as a whole does not end before its last `@`. A path with an `@` stays where no user stands
    before it (`hf://group/name@main`).
    """
    parts, done, last = [], 0, text.rfind("@")
    while (mark := text.find("://", done)) >= 0:
        start = mark + 3
        end = _end(text, start)
        authority, slash, _ = text[start:end].partition("/")
        whole = not text[:start].strip(_SCHEME + ":/")
        if not slash and not whole:
            authority = authority.rstrip(_AFTER)
        if ":" in authority and start < last:
            if whole:
                end = max(end, _end(text, last))
            elif not _PORT.fullmatch(authority):
                end = max(end, _end(text, text.find("@", start)))
        url = text[start:end]
        if ":" in authority or "@" in re.split("[/?]", url, maxsplit=1)[0]:
            url = url[url.rfind("@") + 1 :]
        path, _, query = url.partition("?")
        parts += [text[done:start], path, query[len(query.rstrip(_AFTER)) :]]
        done = end
    return "".join([*parts, text[done:]])


def without_folders(text: str) -> str:
    """Replace the folders of the absolute local paths in a text, for files that are given to others."""
    return _FOLDERS.sub(".../", text)


def _end(text: str, start: int) -> int:
    """Return the place of the first white space at or after `start`, or of the end."""
    found = _SPACE.search(text, start)
    return found.start() if found else len(text)


def _escaped(letter: str) -> str:
    return " " if letter.isspace() else letter.encode("unicode_escape").decode("ascii")
