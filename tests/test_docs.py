"""The documentation as a reader gets it: rendered. Tables, links, commands, names, and what it quotes of the code."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from kl_alliteration.penalty import CONTRACT, FORWARD

ROOT = Path(__file__).parent.parent
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARD = ROOT / "kl_alliteration/story_lm/model/README.md"
PAGES = [*MANUAL, *(ROOT / name for name in ("AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md")), CARD]
MARKDOWN = MarkdownIt("commonmark").enable("table")


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


def tokens_of(page: Path) -> list:
    """Blocks, and what is in each line of text, in one row."""
    blocks = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or []))]


def code_of(page: Path) -> list[str]:
    """The code spans and blocks, each as one text, long lines joined."""
    found = [token.content for token in tokens_of(page) if token.type in ("code_inline", "fence", "code_block")]
    return [code.replace("\\\n", " ") for code in found]


def python_of(page: Path) -> list[str]:
    return [token.content for token in tokens_of(page) if token.type == "fence" and token.info == "python"]


def cells_of(line: str) -> list[str]:
    """A table's line of source, split as renderers do it: at every pipe that is not escaped, in code too."""
    cells = re.split(r"(?<!\\)\|", line.strip())
    return cells[1:-1] if not cells[0] and not cells[-1] else cells


def rendered_tables(page: Path) -> list[list[list[str]]]:
    """Table to row to cell, as text without markup."""
    tables: list = []
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append("")
        elif token.type == "inline" and tables and token.level > 3:
            tables[-1][-1][-1] = "".join(child.content for child in token.children)
    return tables


def anchors_of(page: Path) -> set[str]:
    """The names by which GitHub links to headings."""
    blocks = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    pairs = zip(blocks, blocks[1:], strict=False)
    headings = [after.content for before, after in pairs if before.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named(PAGES)
def test_every_row_of_a_table_has_the_cells_of_its_header(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks = MARKDOWN.parse("\n".join(lines))
    tables = [range(*block.map) for block in blocks if block.type == "table_open"]
    code = {n for block in blocks if block.type in ("fence", "code_block") for n in range(*block.map)}
    for table in tables:
        header = cells_of(lines[table[0]])
        for n in table:
            assert len(cells_of(lines[n])) == len(header), f"{page.name}, line {n + 1}: {lines[n]}"
    meant = {n for n, line in enumerate(lines) if line.lstrip().startswith("|")} - code
    stray = meant - {n for table in tables for n in table}
    assert not stray, f"{page.name}, line {min(stray) + 1}: no renderer takes this for a table"


def test_the_contract_as_it_is_rendered_is_the_one_of_the_code():
    rows = [[*choice, row.gradient, row.use_instead or ""] for choice, row in CONTRACT.items()]
    rows += [["exact, forward", placement, row.gradient, row.use_instead or ""] for placement, row in FORWARD.items()]
    header = ["estimator", "placement", "expected gradient", "use instead"]
    (shown,) = [table[1:] for table in rendered_tables(ROOT / "docs/kl.md") if table[0] == header]
    assert shown == rows


@named(PAGES)
def test_links_and_images_lead_somewhere(page):
    for token in tokens_of(page):
        target = token.attrs.get("src" if token.type == "image" else "href")
        if token.type not in ("link_open", "image") or re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), f"{page.name} leads to {target}"
        assert not anchor or anchor in anchors_of(place), f"{page.name} leads to {target}, which has no such heading"


def test_every_page_is_in_the_site_s_navigation():
    """`make docs` checks it too, with what it needs installed."""
    listed = re.findall(r"^ +- .*: (\w+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(set(listed)) == sorted(listed)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= set(listed)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_the_first_python_of_the_readme_is_the_minimal_recipe():
    recipe = (ROOT / "recipes/minimal.py").read_text(encoding="utf-8")
    assert python_of(ROOT / "README.md")[0] == recipe
    assert len(recipe.splitlines()) <= 45


@named(MANUAL)
def test_commands_name_what_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in (line.strip() for code in code_of(page) for line in code.splitlines()):
        scripts = re.findall(r"\bpython3? (?!-)(\S+)", line)
        if "accelerate launch " in line:
            scripts += [word for word in line.split("accelerate launch ", 1)[1].split() if word.endswith(".py")][:1]
        missing = [script for script in scripts if not (ROOT / script).is_file()]
        missing += [name for name in re.findall(r"\bpython3? -m ([\w.]+)", line) if not importlib.util.find_spec(name)]
        missing += [name for name in re.findall(r"^make ([\w-]+)", line) if name not in targets]
        assert not missing, f"{page.name}, {line!r}: there is no {', '.join(missing)}"


@named([*MANUAL, ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"])
def test_paths_in_code_are_files(page):
    folder = r"\b(?:accelerate_configs|benchmarks|docs|kl_alliteration|recipes|studies|tests)/"
    for code in code_of(page):
        for path in re.findall(folder + r"[a-z0-9_./-]+\.(?:jsonl|json|md|py|txt|yaml)\b", code):
            assert (ROOT / path).is_file(), f"{page.name}: there is no {path}"


def resolve(name: str):
    """What a dotted name of this package stands for; `ImportError` or `AttributeError` where there is nothing."""
    found = importlib.import_module("kl_alliteration")
    for i, part in enumerate(parts := name.split(".")[1:], 1):
        if not hasattr(found, part):
            importlib.import_module(".".join(("kl_alliteration", *parts[:i])))
        found = getattr(found, part)
    return found


@named(MANUAL)
def test_names_of_the_package_exist(page):
    names = {name for code in code_of(page) for name in re.findall(r"\bkl_alliteration(?:\.[A-Za-z]\w*)+", code)}
    for code in python_of(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("kl_alliteration"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for name in names:
        resolve(name.removesuffix(".NAME"))
