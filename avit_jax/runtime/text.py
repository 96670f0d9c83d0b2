"""Text from elsewhere for messages and pages: what no terminal or browser should obey is escaped."""

from collections.abc import Callable


def escaped(text: str, is_plain: Callable[[str], bool] = str.isprintable) -> str:
    r"""The text with each character that is not plain written as an escape (\n, \x1b, \ud800)."""
    return "".join(c if is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what an error says, at most so many characters; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
