"""The KL per token: what the judge keeps of it, and the heat along the stories of the page."""

import json
import math

import pytest
import torch
from conftest import WORDS
from test_report import a_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kl_alliteration import judge
from kl_alliteration.evaluation import pieces
from kl_alliteration.lab.heat import Story, Token, scale, tokens_of, with_tokens
from kl_alliteration.lab.report import write_report
from kl_alliteration.text import alliterating_words


@pytest.fixture(scope="module")
def bytes_only():
    """A byte-level BPE of single bytes: a letter with an accent is two tokens, an emoji four."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([""], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def test_a_token_within_a_character_adds_nothing_until_it_is_whole(bytes_only):
    ids = bytes_only("né 🦊!")["input_ids"] + [bytes_only.eos_token_id]
    assert pieces(bytes_only, ids) == ["n", "", "é", " ", "", "", "", "🦊", "!", ""]
    broken = ids[1:2] + ids[4:6]  # half of a letter, the half of an emoji, and then the story is over
    assert "".join(pieces(bytes_only, broken)) == bytes_only.decode(broken) == "\ufffd\ufffd"
    assert pieces(bytes_only, []) == []


def test_a_tokenizer_that_puts_spaces_between_words(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("once upon a time")["input_ids"]
    assert pieces(tokenizer, ids) == ["once", " upon", " a", " time"]


def test_the_judge_keeps_the_exact_kl_of_each_token(tiny_model):
    """Logits that do not depend on the context: each token has the KL of the same two distributions."""
    model, ref = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.nn.init.zeros_(ref.get_output_embeddings().weight)
    head = torch.nn.Linear(model.config.hidden_size, len(WORDS))
    torch.manual_seed(0)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    p = head.bias.detach().softmax(-1)
    exact = (p * (p.log() + math.log(len(WORDS)))).sum().item()

    def reward(completions, **columns):
        return [0.0] * len(completions)

    judged = judge(model, tokenizer, ["once upon"] * 20, reward, max_new_tokens=6, ref_model=ref, batch_size=7)
    rows = judged.rows()
    assert ["".join(row["tokens"]) for row in rows] == judged.completions
    lengths = [len(row["token_kls"]) for row in rows]
    assert sum(lengths) == 20 * judged.mean_length and len(set(lengths)) > 1  # some ended early: no padding is kept
    assert [kl for row in rows for kl in row["token_kls"]] == pytest.approx([exact] * sum(lengths), abs=2e-6)
    assert judged.exact_kl_per_sequence == pytest.approx(exact * judged.mean_length, rel=1e-5)
    assert not {"tokens", "token_kls"} & set(judged.numbers())
    alone = judge(model, tokenizer, ["once upon"], reward, max_new_tokens=3)
    assert set(alone.rows()[0]) == {"prompt", "completion", "reward"}


def test_the_tokens_of_one_character_are_one_with_the_sum_of_their_kl():
    row = {"completion": "né!", "tokens": ["n", "", "é", "!", ""], "token_kls": [0.5, 0.25, 1, -1e-7, 0.125]}
    assert tokens_of(row) == [Token("n", 0.5), Token("é", 1.25, 2), Token("!", 0.0), Token("", 0.125)]


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"token_kls": [1.0]},
        {"tokens": ["a", 3]},
        {"token_kls": [1.0, None]},
        {"token_kls": [1.0, "<b>"]},
        {"token_kls": [1.0, math.inf]},
        {"completion": "of another text"},
    ],
)
def test_what_is_not_the_tokens_of_a_text_gives_no_heat(change):
    row = {"completion": "ab", "tokens": ["a", "b"], "token_kls": [1.0, 2.0]}
    assert tokens_of(row) and tokens_of(row | change) is None


def test_a_text_is_cut_where_words_and_tokens_end():
    story = Story("A tall tree", [Token(" ta", 1.0), Token("ll t", 2.0), Token("ree", 0.0)])
    assert story.words == [
        (False, [("A", None)]),
        (False, [(" ", 0)]),
        (True, [("ta", 0), ("ll", 1)]),
        (False, [(" ", 1)]),
        (True, [("t", 1), ("ree", 2)]),
    ]
    assert [token.kl for token in story.hottest] == [2.0, 1.0, 0.0]
    for text in ("", " \n a  b\u2003bee\x1cc ", "one"):
        words = Story(text).words
        assert "".join(part for _, parts in words for part, _ in parts) == text
        spoken = [("".join(part for part, _ in parts), marked) for marked, parts in words]
        assert [word for word in spoken if not word[0].isspace()] == alliterating_words(text)


def test_the_full_colour_is_that_of_the_hottest_hundredth_and_never_that_of_nothing():
    assert scale([Story("a" * 200, [Token("a", float(place)) for place in range(200)])]) == 198.0
    assert scale([Story("a", [Token("a", 1e-6)])]) == 0.1 == scale([Story("a")])


HOSTILE = ["</span><img src=x onerror=alert(1)>", ' ti"tle', " tall", " 🦊", "\n", " té", "\u202e"]


def with_heat(folder, name: str, tokens=HOSTILE, **changes):
    """A finished run whose first story has these tokens, at 0, 0.5, 1 ... nats, and an end."""
    run, told = a_run(folder, name, 0.1, 10.0), "Tell: " + "".join(tokens)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"stories": [told, "once upon"]}))
    row = {"when": "after", "prompt": "Tell: ", "completion": "".join(tokens), "reward": 1.0, "tokens": [*tokens, ""]}
    row |= {"token_kls": [place / 2 for place in range(len(tokens) + 1)]} | changes
    old = {"when": "after", "prompt": "once", "completion": " upon", "reward": 1.0}
    lines = [row | {"when": "before", "completion": "else"}, row, old]
    (run / "stories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run, told


def test_the_page_has_the_heat_of_the_stories_whose_tokens_are_known(tmp_path):
    run, told = with_heat(tmp_path, "a_seed_0")
    assert [len(story.tokens) for story in with_tokens(run, [told, "once upon"])] == [len(HOSTILE) + 1, 0]
    page = write_report(tmp_path).read_text()
    assert page.count('id="heat"') == 1 and page.count('class="heat"') == 1
    assert "&lt;/span&gt;&lt;img" in page and "<img" not in page.split("</script>")[-2]
    assert 'title="“tall”: 1.00 nats (token 3 of 8)"' in page
    assert "Highest: the end: 3.50 nats; “\u202e”: 3.00 nats; “té”: 2.50 nats" in page
    assert 'style="--h:1.00"' in page and 'style="--h:0.00"' in page  # the hottest of eight, and the first
    markdown = (tmp_path / "report.md").read_text()
    assert "**tall**" in markdown and "nats (token" not in markdown


@pytest.mark.parametrize("content", [None, "", "[1]", '{"when": "after"', '{"when": "after", "tokens": 3}\n', "\x00"])
def test_a_run_that_kept_no_tokens_still_opens(tmp_path, content):
    run, _ = with_heat(tmp_path, "a_seed_0")
    (run / "stories.jsonl").unlink() if content is None else (run / "stories.jsonl").write_text(content)
    page = write_report(tmp_path).read_text()
    assert "<mark>tall</mark>" in page and 'id="heat"' not in page and 'class="t' not in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_hides_and_reads_the_heat(browser, tmp_path, scheme):
    _, told = with_heat(tmp_path, "a_seed_0")
    path = write_report(tmp_path)
    page, errors = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme), []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(path.as_uri())

    def grounds():
        style = "all => all.map(e => getComputedStyle(e).backgroundColor)"
        return page.eval_on_selector_all("blockquote .t", style)

    shown = page.eval_on_selector("blockquote", "q => q.textContent").strip()
    hot = grounds()
    page.focus("blockquote.heat")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    by_key = page.inner_text(".said")
    page.locator("blockquote .t[data-t='5']").last.click()
    by_tap = page.inner_text(".said")
    wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    page.uncheck("#heat")
    cold, marked = grounds(), page.eval_on_selector("mark", "m => getComputedStyle(m).backgroundColor")
    legends = page.eval_on_selector_all(".legend, .said", "all => all.filter(e => e.offsetParent).length")
    page.reload()
    stays = page.is_checked("#heat")
    assert " ".join(shown.split()) == " ".join(f"{told} ■".split())  # the text as it is, and the end
    assert len(set(hot)) >= 7 and set(cold) == {"rgba(0, 0, 0, 0)"} and marked != "rgba(0, 0, 0, 0)"
    assert by_key == '“ti"tle”: 0.50 nats (token 2 of 8)' and by_tap == "“té”: 2.50 nats (token 6 of 8)"
    assert not errors and not wide and not legends and not stays
