"""Reads the text of a caption file."""

import re
from codecs import BOM_UTF8
from pathlib import Path

from caption_train.data.formats import MAX_CAPTION_BYTES
from caption_train.errors import CaptionTrainError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import TooLarge, read_regular_file

TOKEN_NAMES = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"  # <|im_end|>, <|endoftext|>
    r"|</?(?:s|bos|eos|pad|unk|mask|sep|cls|image|img|start_of_turn|end_of_turn|end_of_utterance|think)>"
    r"|\[/?(?:CLS|SEP|PAD|UNK|MASK|BOS|EOS|DEC|ENC|INST)\]"
)
"""How models of the last years write their control tokens."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_caption(path: Path | str, encoding: str = "utf-8") -> str:
    """Return the caption in a file as one line: lines stripped, empty ones dropped, others joined by spaces.

    A byte order mark is dropped, and all kinds of line end are read.

    Args:
        path: the caption file.
        encoding: a codec name of Python.

    Raises:
        CaptionTrainError: names the file if it is not a regular file, is not text in `encoding`, contains NUL
            characters or is longer than 1 MB.
    """
    try:
        return decode_caption(read_regular_file(path, MAX_CAPTION_BYTES), encoding)
    except TooLarge as error:
        size = str(error).partition(",")[0]
        reason = f"{size}, longer than any caption (limit 1 MB)"
        raise CaptionTrainError(f"{escape_unprintable(path)}: {reason}") from error
    except OSError as error:
        raise CaptionTrainError(f"{escape_unprintable(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise CaptionTrainError(f"{escape_unprintable(path)}: {error}") from error


def refuse_odd_characters(text: str) -> None:
    """Raise ValueError for characters that no caption has and no tokenizer accepts."""
    if "\0" in text:
        raise ValueError("NUL characters, so this is no text")
    if _SURROGATE.search(text):
        raise ValueError("half characters (lone surrogates)")


def join_lines(text: str) -> str:
    r"""Return text as one line: lines stripped, empty ones dropped, the rest joined by spaces.

    >>> join_lines("a cat \n\n  on a mat ")
    'a cat on a mat'
    """
    return " ".join(line for line in (line.strip() for line in text.splitlines()) if line)


def decode_caption(data: bytes, encoding: str = "utf-8") -> str:
    """Return the caption that the bytes of a caption file hold, as `read_caption` does.

    Args:
        data: the bytes.
        encoding: a codec name of Python.

    Raises:
        ValueError: they are not text in `encoding`, or hold characters that no caption has.
    """
    plain = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    # UTF-16, which Windows editors write, begins with one of these two byte order marks.
    if plain and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(
            "not UTF-8 but UTF-16, by its first bytes; compile_captions.py --encoding utf-16 reads it"
        )
    try:
        has_mark = data.startswith(BOM_UTF8)
        # Without a mark both are the same, and the codec that looks for it is written in Python.
        text = data.decode(("utf-8-sig" if has_mark else "utf-8") if plain else encoding)
    except UnicodeError as error:
        at = f" (position {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        hint = (
            "; compile_captions.py --encoding cp1252, or whatever it was written in, reads it"
            if plain
            else ""
        )
        raise ValueError(f"not {encoding.upper()} text{at}{hint}") from error
    refuse_odd_characters(text)
    return join_lines(text)
