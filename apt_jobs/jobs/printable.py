"""What may be in a name that others read: printable text of any language, nothing that moves a cursor or turns text.

Names are shown in terminals, pages and logs. A control character or an escape sequence in one would act on the reader's
terminal, a bidirectional override would make it read as another name.
"""

import unicodedata

_REFUSED = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, lone surrogates, line and paragraph separators
# Of the format characters (Cf), those that scripts and emoji need; the others are invisible or turn the text around.
_JOINERS = frozenset("\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")
_TAGS = range(0xE0020, 0xE0080)  # of flags


def first_unprintable(text: str) -> int | None:
    """Return the index of the first character that no name may have; None: there is none."""
    if text.isascii() and text.isprintable():
        return None
    return next((index for index, char in enumerate(text) if _is_unprintable(char)), None)


def escaped(text: str) -> str:
    r"""Return `text` with each character that no name may have as its escape, as in `\x1b`."""
    if first_unprintable(text) is None:
        return text
    return "".join(char.encode("unicode_escape").decode() if _is_unprintable(char) else char for char in text)


def require_printable(text: str) -> str:
    """Return `text` if it may be a name.

    Raises:
        ValueError: it has a character that is not printable; the message says which and where.
    """
    if (index := first_unprintable(text)) is not None:
        code = ord(text[index])
        name = unicodedata.name(text[index], "a control character")
        raise ValueError(
            f"U+{code:04X} ({name}) at character {index} is not printable; send printable text, without control "
            "characters, escape sequences, line breaks and marks that turn text around"
        )
    return text


def _is_unprintable(char: str) -> bool:
    category = unicodedata.category(char)
    return category in _REFUSED or (category == "Cf" and char not in _JOINERS and ord(char) not in _TAGS)
