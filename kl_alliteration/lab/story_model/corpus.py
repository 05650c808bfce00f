"""The story corpus: hand-written skeletons with slots, drawn from a seed.

A skeleton (`stories/*.txt`) binds a few variables to lexicon categories for the length of one story (the hero, the
thing that matters) and holds a body with slots and alternatives:

    # the-lost-kite
    hero: child animal
    thing: toy
    Once upon a time there was a {trait} {hero.kind} named {hero} who (loved|had) a {look} {thing}. ...

`{category}` draws a fresh word, `{variable}` repeats a bound one, `(a|b|)` chooses. Verbs take `+ed` and `+ing`, nouns
`+s`. Characters know `.kind .the .he .him .his .himself`. Articles and sentence capitals are put right at the end.

    python -m kl_alliteration.lab.story_model.corpus lint [FILE ...]
    python -m kl_alliteration.lab.story_model.corpus sample 5 [FILE ...]
"""

import argparse
import random
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CHARACTERS = ("child", "animal", "person", "elder")
PRONOUNS = {
    "m": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "f": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "n": {"he": "it", "him": "it", "his": "its", "himself": "itself"},
}
SLOT = re.compile(r"\{([a-z_0-9]+)(?:\.([a-z]+))?(?:\+([a-z]+))?\}")


@dataclass(frozen=True)
class Word:
    """One lexicon entry. `forms`: past and -ing of a verb, plural of a noun, where the rule would get them wrong."""

    text: str
    category: str
    forms: tuple[str, ...] = ()
    gender: str | None = None
    name: str | None = None  # a family elder's form of address: mother -> Mom


@dataclass(frozen=True)
class Entity:
    """A word bound to a variable, with the name and the gender that it keeps through the story."""

    word: Word
    gender: str
    name: str | None

    def attribute(self, name: str | None) -> str:
        if name in PRONOUNS["n"]:
            return PRONOUNS[self.gender][name]
        kind = {"f": "girl", "m": "boy"}[self.gender] if self.word.category == "child" else self.word.text
        if name == "kind":
            return kind
        if name == "the" or (name is None and self.word.category == "person"):
            return f"the {kind}"
        if name is None:
            return self.name or kind
        raise ValueError(f"unknown attribute .{name}")


@dataclass(frozen=True)
class Skeleton:
    slug: str
    variables: dict[str, list[str]]
    body: str


def load_lexicon(path: Path = HERE / "lexicon.txt") -> dict[str, list[Word]]:
    """`[category]` sections of `word`, `noun/plural`, `verb/past/ing`, `Name:f`, `mother=Mom:f`."""
    lexicon: dict[str, list[Word]] = {}
    category = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line.strip()):
            category = match[1]
            lexicon[category] = []
            continue
        for entry in line.split():
            entry, _, gender = entry.partition(":")
            entry, _, name = entry.partition("=")
            text, *forms = entry.split("/")
            lexicon[category].append(Word(text, category, tuple(forms), gender or None, name or None))
    return lexicon


def load_skeletons(paths: list[Path] | None = None) -> list[Skeleton]:
    skeletons = []
    for path in paths or sorted((HERE / "stories").glob("*.txt")):
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip()):
            lines = [line.strip() for line in block.splitlines() if line.strip()]
            if not lines[0].startswith("# "):
                raise ValueError(f"{path.name}: a skeleton starts with '# slug', got {lines[0]!r}")
            header, body = lines[1:-1], lines[-1]
            variables = {}
            for line in header:
                name, _, categories = line.partition(":")
                variables[name.strip()] = categories.split()
            skeletons.append(Skeleton(lines[0][2:].strip(), variables, body))
    return skeletons


def _choose(text: str, rng: random.Random) -> str:
    """Resolve `(a|b|c)` from the inside out."""
    inner = re.compile(r"\(([^()]*)\)")
    while match := inner.search(text):
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]
    if any(c in text for c in "()|"):
        raise ValueError("unbalanced parentheses or a | outside of them")
    return text


def inflect(word: Word, form: str | None) -> str:
    """`+ed`, `+ing` (verbs) and `+s` (nouns): the listed irregular form, else the regular one."""
    text = word.text
    if form is None:
        return text
    if form == "s":
        if len(word.forms) == 1:
            return word.forms[0]
        if re.search(r"[^aeiou]y$", text):
            return text[:-1] + "ies"
        return text + ("es" if re.search(r"(s|x|z|ch|sh)$", text) else "s")
    if form in ("ed", "ing"):
        if len(word.forms) == 2:
            return word.forms[0 if form == "ed" else 1]
        if form == "ed":
            if re.search(r"[^aeiou]y$", text):
                return text[:-1] + "ied"
            return text + ("d" if text.endswith("e") else "ed")
        return (text[:-1] if text.endswith("e") and not text.endswith("ee") else text) + "ing"
    raise ValueError(f"unknown form +{form}")


# This share of the adjectives before a bound noun, and of the animals' names, is drawn from the noun's own first
# letter, so that "a zany zebra named Zoe" exists for every letter.
ALLITERATING_SHARE = 0.12
# A noun has two adjectives as often as one: adjectives are where stories differ, and where alliteration finds room.
SECOND_ADJECTIVE_SHARE = 0.5
ADJECTIVES = ("look", "scene", "trait")


def plainness(word: Word) -> float:
    """How often a word is drawn among those of its category: plain words are short, and children's books use them."""
    return 1 / (len(word.text) - 1)


class Story:
    """One draw: binds the variables, then fills the body."""

    def __init__(self, skeleton: Skeleton, lexicon: dict[str, list[Word]], rng: random.Random):
        self.lexicon, self.rng = lexicon, rng
        self.used: set[str] = set()
        self.entities = {name: self._bind(categories) for name, categories in skeleton.variables.items()}
        self.text = tidy(self._fill(_choose(skeleton.body, rng)))

    def _draw(self, category: str, letter: str | None = None) -> Word:
        if category not in self.lexicon:
            raise ValueError(f"unknown category {{{category}}}")
        words = self.lexicon[category]
        if letter and self.rng.random() < ALLITERATING_SHARE:
            words = [w for w in words if w.text[0].lower() == letter and w.text not in self.used] or words
        weights = [plainness(w) for w in words]
        for _ in range(50):
            (word,) = self.rng.choices(words, weights)
            if word.text not in self.used:
                break
        self.used.add(word.text)
        return word

    def _bind(self, categories: list[str]) -> Entity:
        word = self._draw(self.rng.choice(categories))
        if word.category not in CHARACTERS:
            return Entity(word, "n", None)
        if word.category == "child":
            return Entity(word, word.gender, word.text)
        gender = word.gender or self.rng.choice("mf")
        name = word.name
        if word.category == "animal":
            names = [w for w in self.lexicon["child"] if w.gender == gender and w.text not in self.used]
            same = [w for w in names if w.text[0].lower() == word.text[0]]
            name = self.rng.choice(same if same and self.rng.random() < ALLITERATING_SHARE else names).text
            self.used.add(name)
        return Entity(word, gender, name)

    def _fill(self, text: str) -> str:
        pieces = []
        position = 0
        for match in SLOT.finditer(text):
            pieces += [text[position : match.start()], self._slot(text, match)]
            position = match.end()
        text = "".join(pieces) + text[position:]
        if "{" in text or "}" in text:
            raise ValueError("a slot that is no {name}, {name.attribute} or {name+form}")
        return text

    def _slot(self, text: str, match: re.Match) -> str:
        name, attribute, form = match.groups()
        if name in self.entities:
            entity = self.entities[name]
            return inflect(entity.word, form) if form else entity.attribute(attribute)
        if attribute:
            raise ValueError(f"{match[0]}: only a variable of the header has attributes")
        following = SLOT.match(text, match.end() + 1) if text[match.end() : match.end() + 1] == " " else None
        letter = None
        if following and following[1] in self.entities:
            letter = self.entities[following[1]].attribute(following[2])[0].lower()
        word = inflect(self._draw(name, letter), form)
        before_noun = name in ADJECTIVES and re.match(r" [\w{]", text[match.end() :])
        if before_noun and self.rng.random() < SECOND_ADJECTIVE_SHARE:
            return f"{word}, {self._draw(name, letter).text}"
        return word


def tidy(text: str) -> str:
    """Articles, sentence capitals and spaces."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r" ([,.!?;:])", r"\1", text).strip()
    text = re.sub(r"\b([Aa])n? (?=\w)", _article, text)
    # After a quoted question or exclamation its speaker may follow: "Who?" asked Mia.
    return re.sub(r"""(^"?|[.!?] "?|\." "?|[!?]" "|^[^"]*, ")([a-z])""", lambda m: m[1] + m[2].upper(), text)


def _article(match: re.Match) -> str:
    rest = match.string[match.end() :].lower()
    vowel = re.match(r"[aeiou]|hour|honest|heir|honou?r", rest) and not re.match(
        r"uni|use|usu|uke|eu|one\b|once|ute", rest
    )
    return match[1] + ("n " if vowel or re.match(r"x-?ray", rest) else " ")


def stories(seed: int, count: int, skeletons=None, lexicon=None):
    """Yield `count` stories, the same ones for the same seed; each skeleton comes up equally often on average."""
    skeletons, lexicon = skeletons or load_skeletons(), lexicon or load_lexicon()
    rng = random.Random(seed)
    for _ in range(count):
        yield Story(rng.choice(skeletons), lexicon, rng).text


def known_words(lexicon=None, skeletons=None) -> set[str]:
    """Every word that the corpus can contain, lower-cased: the lexicon in all forms and the fixed text."""
    lexicon, skeletons = lexicon or load_lexicon(), skeletons or load_skeletons()
    words = {pronoun for table in PRONOUNS.values() for pronoun in table.values()} | {"girl", "boy", "the", "a", "an"}
    for category in lexicon.values():
        for word in category:
            words |= {inflect(word, form).lower() for form in (None, "s", "ed", "ing")} | {(word.name or "").lower()}
    for skeleton in skeletons:
        words |= set(split_words(SLOT.sub(" ", skeleton.body)))
    return words - {""}


def split_words(text: str) -> list[str]:
    """Lower-cased words without punctuation; a possessive counts as its owner."""
    return [re.sub(r"'s?$", "", w) for w in re.findall(r"[a-z][a-z'\-]*", text.lower())]


def lint(paths: list[Path] | None = None, draws: int = 40) -> list[str]:
    """What is wrong with skeletons: syntax, unknown names, length (60 to 110 words), few choices, doubled words."""
    lexicon, problems, slugs = load_lexicon(), [], set()
    for skeleton in load_skeletons(paths):
        rng = random.Random(skeleton.slug)
        try:
            texts = [Story(skeleton, lexicon, rng).text for _ in range(draws)]
        except (ValueError, KeyError, IndexError) as error:
            problems.append(f"{skeleton.slug}: {error}")
            continue
        if skeleton.slug in slugs:
            problems.append(f"{skeleton.slug}: the slug is taken")
        slugs.add(skeleton.slug)
        unused = [v for v in skeleton.variables if not re.search(r"\{" + v + r"[.+}]", skeleton.body)]
        unknown = [c for cs in skeleton.variables.values() for c in cs if c not in lexicon]
        lengths = [len(text.split()) for text in texts]
        choices = len(SLOT.findall(skeleton.body)) + skeleton.body.count("|")
        repeated = {m[0] for t in texts for m in re.finditer(r"\b(\w+) \1\b", t.lower())} - {"had had", "that that"}
        mean_length = statistics.fmean(lengths)
        checks = [
            (not skeleton.body.startswith("Once upon a time"), "does not start with 'Once upon a time'"),
            (bool(unused), f"variables never used: {unused}"),
            (bool(unknown), f"unknown categories: {unknown}"),
            (max(lengths) > 110 or not 60 <= mean_length <= 104, f"words: mean {mean_length:.0f}, max {max(lengths)}"),
            (choices < 22, f"only {choices} choices"),
            (bool(repeated), f"doubled words: {sorted(repeated)}"),
            (any(re.search(r"[.!?][a-z]| ,|\s{2}|\.\.", t) for t in texts), "punctuation"),
        ]
        problems += [f"{skeleton.slug}: {text}" for failed, text in checks if failed]
    return problems


def main():
    parser = argparse.ArgumentParser(description="Check the story skeletons, or read some stories drawn from them.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("lint", "say what is wrong with the skeletons"), ("sample", "print stories")):
        command = commands.add_parser(name, help=text)
        if name == "sample":
            command.add_argument("count", type=int)
            command.add_argument("--seed", type=int, default=0)
        command.add_argument("files", nargs="*", type=Path, help="skeleton files (default: all)")
    args = parser.parse_args()
    if args.command == "sample":
        print("\n\n".join(stories(args.seed, args.count, load_skeletons(args.files))))
        return
    problems = lint(args.files)
    print("\n".join(problems) or f"{len(load_skeletons(args.files))} skeletons, nothing to report")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
