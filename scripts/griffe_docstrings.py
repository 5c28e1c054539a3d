"""What mkdocs needs to read this package's docstrings: types in backticks become plain, [`Name`] becomes a link."""

from __future__ import annotations

import re
from typing import Any

import griffe

import transformers_sgl

# "name (`type`, *optional*, defaults to x):" and "`type`: What is returned."
_ARGUMENT = re.compile(r"^(?P<head> {4,}\*{0,2}\w+ )\((?P<type>.*?)\):(?= |$)", re.MULTILINE)
_RETURNED = re.compile(r"^(?P<head>Returns:\n {4,})(?P<type>\[?`.*?): ", re.MULTILINE)
_REFERENCE = re.compile(r"\[`(?P<name>[\w.]+)`\](?![(\[])")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for everything that it has found."""
        if obj.docstring is not None:
            text = _ARGUMENT.sub(lambda match: f"{match['head']}({_plain(match['type'])}):", obj.docstring.value)
            text = _RETURNED.sub(lambda match: f"{match['head']}{_plain(match['type'])}: ", text)
            obj.docstring.value = _REFERENCE.sub(_link, text)


def _plain(words: str) -> str:
    words = re.sub(r", defaults to .*", "", words)  # the signature tells
    words = re.sub(r"[`*]|\[(?=`)|(?<=`)\]", "", words)
    return words if "(" in words else re.sub(r", (?=.* or )", " or ", words)  # "str, Path or tuple"


def _link(match: re.Match[str]) -> str:
    name = match["name"]
    return f"[`{name}`][transformers_sgl.{name}]" if name in transformers_sgl.__all__ else f"`{name}`"
