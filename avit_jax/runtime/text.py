"""Untrusted text for messages and pages: what a terminal or browser would obey is escaped."""

from collections.abc import Callable


def escaped(text: str, is_plain: Callable[[str], bool] = str.isprintable) -> str:
    r"""The text with each character that is not plain written as an escape (\n, \x1b, \ud800)."""
    return "".join(c if is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message, at most `most` characters; the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
