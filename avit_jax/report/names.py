"""Names as people read them: class names come from strangers' folders and files, and may hold anything."""

import unicodedata

from avit_jax.model.config import AViTConfig
from avit_jax.runtime.text import escaped

LONGEST = 80  # characters of a class name in the page and in report.json
_JOINERS = "\u200c\u200d"  # invisible, and part of how some scripts and emoji are written


def printable(text: str, most: int | None = None) -> str:
    """The text with control characters, lone surrogates and invisible marks written as escapes (\\n, \\ud800).

    most: characters; a longer text ends in an ellipsis.
    """
    short = text if most is None else text[: most + 1]  # no more than is shown is looked at
    shown = escaped(short, _is_plain)
    return shown if most is None or len(shown) <= most else f"{shown[: most - 1]}…"


def _is_plain(character: str) -> bool:
    # Cf, Zl and Zp hold the marks that turn the direction of text round or break a line without being seen.
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def class_names(model_config: AViTConfig, most: int = LONGEST) -> tuple[str, ...]:
    """The checkpoint's class names, or numbers; each printable and at most so many characters long."""
    return tuple(
        printable(name, most) for name in model_config.class_names or map(str, range(model_config.num_classes))
    )


def verdict(prediction: str, label: str | None, right: bool | None) -> str:
    """What is written at a picture: the answer alone where it is right or nobody knows, else answer and label."""
    if right is not False or label is None:
        return prediction
    if prediction == label:  # a tie counts as wrong; long names may look alike
        return f"answered {prediction}, not clearly"
    return f"answered {prediction}, is {label}"
