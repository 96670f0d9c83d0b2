"""Names made safe to show: class names come from strangers' folders and files, and may contain anything."""

import unicodedata

from avit_jax.model.config import AViTConfig
from avit_jax.runtime.text import escaped

LONGEST = 80  # characters of a class name in the page and in report.json
_JOINERS = "\u200c\u200d"  # invisible characters that some scripts and emoji need


def printable(text: str, most: int | None = None) -> str:
    """The text with control characters, lone surrogates and invisible marks written as escapes (\\n, \\ud800).

    most: characters; a longer text ends in an ellipsis.
    """
    short = text if most is None else text[: most + 1]  # escape no more than is shown
    shown = escaped(short, _is_plain)
    return shown if most is None or len(shown) <= most else f"{shown[: most - 1]}…"


def _is_plain(character: str) -> bool:
    # Cf, Zl and Zp contain invisible marks that reverse the direction of text or break a line.
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def class_names(model_config: AViTConfig, most: int = LONGEST) -> tuple[str, ...]:
    """The checkpoint's class names, or else numbers; each printable and at most this many characters long."""
    return tuple(
        printable(name, most) for name in model_config.class_names or map(str, range(model_config.num_classes))
    )


def verdict(prediction: str, label: str | None, right: bool | None) -> str:
    """The caption of a picture: only the answer if it is right or the label is unknown, otherwise answer and label."""
    if right is not False or label is None:
        return prediction
    if prediction == label:  # a tie counts as wrong; long names may look alike
        return f"answered {prediction}, not clearly"
    return f"answered {prediction}, is {label}"
