"""A model's text in Markdown is that text and nothing else: rendered, by an independent library."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transformers import LlamaConfig, LlamaForCausalLM

from kl_alliteration.evaluation import Judgement
from kl_alliteration.lab.heat import Story
from kl_alliteration.lab.hub import write_card
from kl_alliteration.lab.pages import escaped, fill_template, quoted
from kl_alliteration.lab.run import show

HOSTILE = [
    "![x](http://a.b/c.png) [a](b) <http://a.b> [c]: d",
    "# heading\n\n## another\n===\n---\n",
    "one\n\n> two\n\n    three\r\n\tfour  \n- five\n1. six",
    "a | b\n|---|---|\n| c | d |",
    "<script>alert('1')</script> <!-- gone --> &amp; &lt; &#35;",
    "*a* **b** _c_ __d__ ~~e~~ `f` ``g`` ```h``` ***",
    "```\ncode\n```",
    "back\\slash \\* \\",
    "- - -",
    "--- + a 12. b 3) c",
    "1. a list?",
    "+ tall trees",
    "*tall *trees* to* touch_ _the_top_",
    "[!NOTE] [ ] [x] $a$ www.a.b http://a.b a@b.c",
    "",
]
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ALPHABET = st.one_of(
    st.sampled_from("\\`*_[]()<>#|~$@!+-=.:&;0123456789ab \n\t"), st.characters(exclude_characters="\0")
)


def paragraph(markdown: str) -> tuple[list[str], list[str], str]:
    """The blocks of a page, what its text is set in, and the text."""
    tokens = MARKDOWN.parse(markdown)
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    assert {token.type for token in inline} <= {"text", "strong_open", "strong_close", "softbreak"}
    text = "".join(token.content if token.type == "text" else "\n" * (token.type == "softbreak") for token in inline)
    return [token.tag for token in tokens if token.nesting == 1], text


def as_one_line(text: str) -> str:
    return " ".join(text.split())


def check(story: str, marked: bool) -> None:
    tags, text = paragraph(quoted(story, marked))
    assert text == as_one_line(story)
    assert tags == (["blockquote", "p"] if text else ["blockquote"])


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("story", HOSTILE)
def test_a_story_shows_as_its_text(story, marked):
    check(story, marked)


@given(st.text(ALPHABET.filter(lambda c: not "\ud800" <= c <= "\udfff"), max_size=40), st.booleans())
def test_whatever_a_model_says_shows_as_its_text(story, marked):
    check(story, marked)


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_a_name_stays_in_its_heading_and_in_its_cell(text):
    tags, shown = paragraph(f"# {escaped(text)}")
    assert (tags, shown) == (["h1"], as_one_line(text))
    tokens = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {escaped(text)} | 2 |")
    assert [token.children[0].content for token in tokens if token.type == "inline"] == [
        "a",
        "b",
        as_one_line(text),
        "2",
    ]


def test_plain_words_are_left_as_they_are():
    story = 'Once upon a time, "Look! A well-made kite," said Mia; it cost 2.50 (or 3). See file_name_1: yes?'
    assert quoted(story) == f"> {story}"
    assert quoted("the tall tree fell", marked=True) == "> **the** **tall** **tree** fell"


def judgement(texts: list[str]) -> Judgement:
    numbers = [len(texts), 5.0, 1.0, 1.0, 0.5, 6.0, 0.0, 9.0, 1.4, None, None, None]
    return Judgement(*numbers, rewards=[5.0] * len(texts), prompts=[""] * len(texts), completions=texts)


def quotes(page: str) -> list[str]:
    """The texts of a page's quotations, each in a paragraph of its own."""
    tokens = MARKDOWN.parse(page)
    open_ = [i for i, token in enumerate(tokens) if token.type == "blockquote_open"]
    assert all(tokens[i + 1].type == "paragraph_open" and tokens[i + 4].type == "blockquote_close" for i in open_)
    return ["".join(child.content for child in tokens[i + 2].children) for i in open_]


def test_every_page_shows_hostile_stories_as_their_text(tmp_path, tiny_model):
    before, after = HOSTILE[:3], HOSTILE[3:6]
    show(judgement(before), judgement(after), tmp_path)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model))
    trainer = SimpleNamespace(
        hub_model_id="ada/tall-tree",
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        train_dataset=[{"prompt": "Once"}],
    )
    write_card(tmp_path, trainer, "none", ["reward"], judgement(before), judgement(after))
    values = {"title": "a_b", "head": ["run"], "rows": [["x | y"]], "missing": [], "notes": [], "figures": []}
    values["health"] = [{"name": "a_b", "alarmed": True, "summary": "1 alarm", "lines": ["step 3, spike: '<b>*_`'"]}]
    told = {"before": list(map(Story, before)), "after": list(map(Story, after))}
    fill_template(tmp_path / "report.md", **values, stories=told)
    run = SimpleNamespace(kl=1.0, reward=2.0, folder=tmp_path)
    equal = {name: SimpleNamespace(texts=texts, **vars(run)) for name, texts in (("a", before), ("b", after))}
    fill_template(tmp_path / "algorithms.md", stories=5, base=4.0, head=["run"], rows=[], equal=equal)
    for name in ("stories.md", "README.md", "report.md", "algorithms.md"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        text = page.split("---\n", 2)[-1] if name == "README.md" else page  # after its metadata
        assert quotes(text) == [as_one_line(text) for text in before + after], name
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and card.endswith("\n") and "| reward_mean | 5.000 | 5.000 |\n" in card
    assert 'AutoModelForCausalLM.from_pretrained("ada/tall-tree")' in card
