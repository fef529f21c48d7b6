"""Text from elsewhere, before a person or a file gets it: without secrets, and without characters that break or hide it."""

import re
from typing import Any

# An address in a text; the query of one in quotes ends where they do. A password with a stray /, ? or # ends at the last @.
_ADDRESS = re.compile(
    r"""(?P<quote>["'])?(?P<scheme>\w{1,9}://)
    (?:[^\s/?#]*@|[^\s/?#:\[]*:(?!\d+(?:[/?#\s]|$))\S*@)?
    (?P<place>(?:(?!\w{1,9}://)[^\s?#])*)
    (?:[?#](?(quote)(?:\S*?(?=(?P=quote)(?:[\s,;:.)\]}]|$))|\S*)|\S*))?""",
    re.VERBOSE,
)
# Control characters but tab and line feed, halves of surrogate pairs, what XML has no place for, and what reorders the
# text around it.
_NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def public_address(text: str) -> str:
    """An address, or each one in a text, without credentials, query and fragment: they may be signed."""
    return _ADDRESS.sub(r"\g<quote>\g<scheme>\g<place>", text)


def redact(text: str) -> str:
    """The text without access tokens of the Hub, and with addresses that anybody may see."""
    return re.sub(r"(hf|api_org)_\w{16,}", r"\1_...", public_address(text))


def printable(text: str) -> str:
    """The text with U+FFFD for each character that a page, a picture or a terminal would not show as it is."""
    return _NOT_SHOWN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str) -> str:
    """The text, printable, with a space for each stretch of white space."""
    return printable(" ".join(text.split()))


def all_printable(value: Any) -> Any:
    """A JSON value with all its texts, names included, printable."""
    if isinstance(value, dict):
        return {printable(name): all_printable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [all_printable(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value
