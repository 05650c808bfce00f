"""How often a model's words start with each letter: what `rare_letter_alliteration` weighs with.

    python -m kl_alliteration.lab.letters --model_name_or_path roneneldan/TinyStories-33M --output letters.json

The shares of the embedded story model are in `rewards/letters.json`, made by this command without options.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..evaluation import judge
from ..rewards import LETTER_SHARES
from ..story_lm import MODEL_PATH, PROMPT
from .gguf import as_folder
from .survival import one_line_errors


def count_shares(texts: list[str]) -> dict[str, float]:
    """The share of each of the letters a to z among the first letters of all words that start with one."""
    counts = Counter(word[0].lower() for text in texts for word in text.split())
    total = sum(counts[letter] for letter in ascii_lowercase)
    return {letter: round(counts[letter] / max(1, total), 5) for letter in ascii_lowercase}


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(MODEL_PATH))
    parser.add_argument("--tokenizer_name_or_path", help="where it is not the model's own")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--stories", type=int, default=1_000)
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--output", type=Path, help="default: letters.json; of the embedded model, the package's own")
    args = parser.parse_args()
    if args.output is None:  # the package's is what `rare_letter_alliteration` is made of
        args.output = LETTER_SHARES if args.model_name_or_path == str(MODEL_PATH) else Path("letters.json")
    if args.stories < 1:
        raise ValueError(f"stories must be >= 1, got {args.stories}")
    folder = as_folder(args.model_name_or_path)
    name = args.tokenizer_name_or_path or folder
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = judge(
        model, tokenizer, [args.prompt] * args.stories, lambda prompts, completions: [0.0] * len(prompts),
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    shares = count_shares(found.texts)
    args.output.write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
    common = sorted(shares, key=shares.get, reverse=True)
    print(f"{args.output}: most often {', '.join(common[:5])}, least often {', '.join(common[-5:])}")


if __name__ == "__main__":
    main()
