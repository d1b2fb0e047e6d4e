"""Text in files: its encoding."""

import codecs

from shardprune.storage.malformed import Malformed

# Byte-order marks and the encodings that they announce; that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "UTF-8-sig"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def decode(content: bytes) -> str:
    """Return text without its byte-order mark: UTF-8 unless a mark announces UTF-16 or UTF-32.

    Raises:
        Malformed: it is not in that encoding. Half a surrogate pair is in none.
    """
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig")
        raise Malformed(f"is not {name} text: {error.reason} at byte {error.start}") from error
