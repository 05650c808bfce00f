"""Does a model know how its words are spelt? A linear probe of its token embeddings for first letters.

    python studies/first_letters.py --models kl_alliteration/story_lm/model models/smollm2-135m-instruct

For every token that is a whole lower-case word with a space before it, the probe reads the embedding (what goes in)
or, where it is another, the LM head's row (what comes out) and has to name the first letter, for words that it was not
fitted on: five folds. Beside it the share of the most frequent letter, which a probe of nothing reaches. Where
spelling is not in the vectors, no later layer can have it, and alliteration has to be learnt word by word.
"""

import re
import statistics
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from kl_alliteration.lab.gguf import as_folder
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.story_lm import MODEL_PATH

FOLDS = 5


@dataclass
class Arguments:
    models: list[str] = field(default_factory=lambda: [str(MODEL_PATH)], metadata={"help": "Folders or Hub ids."})
    words: int = field(default=3000, metadata={"help": "Words that are probed, the first of the vocabulary."})


def whole_words(tokenizer, at_most: int) -> dict[str, int]:
    """Tokens that are a lower-case word of three letters and more, with the space before it, by their place."""
    found = {}
    for place in range(len(tokenizer)):
        text = tokenizer.decode([place])
        if re.fullmatch(r" [a-z]{3,}", text):
            found.setdefault(text.strip(), place)
    return dict(list(found.items())[:at_most])


def probe(vectors: np.ndarray, labels: list) -> list[float]:
    """Accuracy of a linear probe on words that it was not fitted on, a fold each."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return cross_val_score(model, vectors, labels, cv=folds).tolist()


@one_line_errors
def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print("| model | vectors | words | first letter, of words not seen | most frequent letter | spread of folds |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        folder = as_folder(name)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        words = whole_words(tokenizer, args.words)
        letters = [word[0] for word in words]
        often = Counter(letters)
        kept = [i for i, letter in enumerate(letters) if often[letter] >= FOLDS]
        labels = [letters[i] for i in kept]
        tables = {"embedding": model.get_input_embeddings().weight}
        if model.get_output_embeddings().weight is not tables["embedding"]:
            tables["LM head"] = model.get_output_embeddings().weight
        for what, table in tables.items():
            vectors = table.detach().float().numpy()[[list(words.values())[i] for i in kept]]
            found = probe(vectors, labels)
            chance = max(Counter(labels).values()) / len(labels)
            print(
                f"| {name} | {what} | {len(kept)} | {statistics.mean(found):.3f} | {chance:.3f} | "
                f"{min(found):.3f} to {max(found):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
