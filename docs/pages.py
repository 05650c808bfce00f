"""What the site has beside this folder: pages of files elsewhere, the notebooks, the reference of the public names."""

import json
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "kl_alliteration/story_lm/model/README.md": "card.md",
} | {f"tutorials/{path.name}": f"tutorial_{path.stem}.md" for path in (ROOT / "tutorials").glob("*.ipynb")}
MODULES = (
    "penalty", "monitor", "health", "control", "target", "credit", "guard", "references", "plots", "yardsticks", "kl",
    "evaluation", "rewards", "rewards.reward_model", "adapters", "shared_prompts", "sampling", "text", "story_lm",
)  # fmt: skip


def in_site(markdown: str, source: Path) -> str:
    """A file with the links between the site's pages, which lie in one folder, and an empty line before each list."""

    def link(found: re.Match) -> str:
        path, hash_, anchor = found[1].partition("#")
        place = (source.parent / path).resolve()
        name = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else path
        return f"]({PAGES.get(name, name.removeprefix('docs/'))}{hash_}{anchor})"

    markdown = re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", link, markdown)
    fence_or_list = r"^```.*?^```|^(?![-\s])[^\n]+\n(?=- )"
    return re.sub(fence_or_list, lambda found: found[0] + "\n" * (found[0][-1] == "\n"), markdown, flags=re.M | re.S)


def notebook(path: Path) -> str:
    """Text, code, and what a cell printed or drew."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![figure](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def reference() -> str:
    names = [f"::: kl_alliteration.{name}" for name in MODULES]
    return "\n\n".join(["# API", "What `kl_alliteration` exports stands under the module that makes it.", *names])


class Plain(griffe.Extension):
    """Docstrings are in transformers' style: Google's sections, with types in Markdown and names in brackets."""

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None and not obj.is_alias:
            text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\](?!\()", r"`\1`", obj.docstring.value)
            text = re.sub(r"^( +)`([\w.\[\]]+)`:", r"\1\2:", text, flags=re.M)  # what is raised or returned
            types = r"^( +\w+) \((.+)\):(?=\s)"  # `name (`type`, *optional*, defaults to `x`):`; the signature has x
            obj.docstring.value = re.sub(types, self.kind, text, flags=re.M)

    @staticmethod
    def kind(found: re.Match) -> str:
        return f"{found[1]} ({found[2].split(', *optional*')[0].replace('`', '')}):"


def on_config(config):
    options = config.plugins["mkdocstrings"].config.handlers["python"]["options"]
    options["extensions"] = [f"{Path(__file__)}:Plain"]
    return config


def on_files(files, config):
    for source, page in PAGES.items():
        path = ROOT / source
        text = notebook(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=in_site(text, path)))
    files.append(File.generated(config, "api.md", content=reference()))
    return files


def on_page_markdown(markdown, page, **kwargs):
    return in_site(markdown, Path(page.file.abs_src_path)) if page.file.abs_src_path else markdown
