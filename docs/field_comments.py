"""Griffe extension for the API reference: what a dataclass says of a field becomes the field's documentation.

A field is documented by a comment behind it, or by the help text of its metadata (`setting(default, "help", ...)`).
"""

import ast
import re
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives every attribute of a class without documentation the text that stands beside it in the source."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Griffe calls this for every class that it has read."""
        for attribute in cls.attributes.values():
            if attribute.docstring is None and not attribute.is_alias and attribute.lineno is not None:
                text = _help(attribute.value) or _comment(attribute)
                if text:
                    attribute.docstring = griffe.Docstring(text, parent=attribute, lineno=attribute.lineno)


def _comment(attribute: griffe.Attribute) -> str:
    source = attribute.source
    match = re.search(r"  # (.*)$", source.splitlines()[-1]) if source else None
    return match[1][:1].upper() + match[1][1:] + "." if match else ""


def _help(value: Any) -> str:
    """The second argument of a call such as setting(0.1, "Share of ..."), or metadata={"help": ...}."""
    try:
        call = ast.parse(str(value), mode="eval").body
    except SyntaxError:
        return ""
    if not isinstance(call, ast.Call):
        return ""
    texts = [word.value for word in call.args[1:2] if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    for keyword in call.keywords:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, entry in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help" and isinstance(entry, ast.Constant):
                    texts.append(str(entry.value))
    return texts[0] if texts else ""
