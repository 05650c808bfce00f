"""Pages from templates, and how a model's text is put into Markdown: as text, whatever it holds."""

import html
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ..text import alliterating_words

TEMPLATES = Path(__file__).parent / "templates"
# What means something anywhere; an address's marks, so that it is no link; words that would start a list or a rule.
SPECIAL = re.compile(r"[\\`*\[\]#|~$@]|(?<![^\W_])_|(?<=www)\.|:(?=//)|(?<!\S)\+(?!\S)|(?<!\S)-(?=-*(?!\S))")
NUMBERED = re.compile(r"(?<!\S)(\d+)(?=[.)](?!\S))")


def escaped(text: str) -> str:
    """A text as one line of Markdown that shows it."""
    line = html.escape(" ".join(text.split()), quote=False)
    return NUMBERED.sub(r"\1\\", SPECIAL.sub(r"\\\g<0>", line))


def quoted(text: str, marked: bool = False) -> str:
    """A model's text as a Markdown quotation of one line; `marked` prints alliterating words bold."""
    words = [(escaped(word), marked and alliterates) for word, alliterates in alliterating_words(text)]
    return " ".join([">", *(f"**{word}**" if bold else word for word, bold in words)])


PAGES = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
PAGES.filters |= {"escaped": escaped, "quoted": quoted, "words": alliterating_words}


def fill_template(path: Path, **values) -> Path:
    """A file filled from the template of its name."""
    path.write_text(PAGES.get_template(path.name).render(values), encoding="utf-8")
    return path
