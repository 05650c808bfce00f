"""Make the embedded story model again: corpus from a seed, tokenizer, pretraining, card.

    python -m kl_alliteration.lab.story_model.train    # into kl_alliteration/story_lm/model
    python -m kl_alliteration.lab.story_model.train --help

The corpus is never written to disk: `corpus.py` draws every story once, so there are no epochs. Held-out stories come
from another seed; they share skeletons and words with the training stories, as everything the model will ever be asked
to write does, but no story.

A hero has to stay the hero, so the model learns to copy a word before it learns stories: left to stories alone, a
model of this size had not found copying by the end of the run (docs/story_model.md). Three things make that quick: a
drill of repeated word lists, layers that see only the token before, and Muon for the hidden weights.
"""

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_linear_schedule_with_warmup,
    set_seed,
)

from ...evaluation import judge
from ...rewards import alliteration_reward
from ...story_lm import MODEL_PATH, PROMPT
from ..pages import escaped
from .corpus import known_words, load_lexicon, load_skeletons, split_words, stories

HELD_OUT_SEED = 1_000_003
WARMUP = 100


@dataclass
class StoryLMArguments:
    """What makes the embedded model; the defaults made the one that is shipped."""

    output_dir: str = field(default=str(MODEL_PATH), metadata={"help": "Folder for weights, tokenizer and card."})
    seed: int = field(default=0, metadata={"help": "Seed of the corpus, the initial weights and the order."})
    stories: int = field(default=84_000, metadata={"help": "Stories to train on, each seen once."})
    vocab_size: int = field(default=4_608, metadata={"help": "Byte-level BPE vocabulary, special tokens included."})
    hidden_size: int = field(default=144, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=432, metadata={"help": "Width of its feed-forward layers."})
    layers: int = field(default=4, metadata={"help": "Depth; every other layer sees only the token before."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    batch_size: int = field(default=16, metadata={"help": "Stories per optimizer step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak, for embeddings, norms and biases (AdamW)."})
    muon_learning_rate: float = field(default=0.02, metadata={"help": "Peak, for the hidden weights (Muon)."})
    copying: float = field(default=0.9, metadata={"help": "Share of copied words right at which the drill ends."})
    card_only: bool = field(default=False, metadata={"help": "Measure the model in output_dir and write its card."})


def train_tokenizer(texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; id 0 ends a text, id 1 pads. No token is added in front: a story starts with its first word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


# The drill repeats words of these categories: what a story has to remember of its hero and of the thing that matters.
REMEMBERED = "child animal person toy food place nature container clothes color trait look".split()


def build_model(args: StoryLMArguments, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2, which is a Llama with attention biases and, in some layers, a sliding window, here of 2 tokens.

    A layer that sees the token before, below one that sees all of them, is the pair that copying takes (Olsson et al.
    2022, arXiv 2209.11895, "induction heads"); full attention alone would have to find the first half of it.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=2,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(args.layers)],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


class Optimizers:
    """Muon for the hidden matrices, AdamW for embeddings, biases and norms, one schedule over both."""

    def __init__(self, model, args: StoryLMArguments):
        hidden = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
        other = [p for n, p in model.named_parameters() if n not in hidden]
        self.parameters = list(model.parameters())
        self.optimizers = [
            torch.optim.Muon(hidden.values(), lr=args.muon_learning_rate, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(other, lr=args.learning_rate, betas=(0.9, 0.98)),
        ]

    def schedule(self, steps: int) -> None:
        """From here: a warm-up, then a straight line to zero at `steps`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])
        self.schedules = [get_linear_schedule_with_warmup(o, WARMUP, steps) for o in self.optimizers]

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()


def single_tokens(tokenizer, categories: list[str]) -> torch.Tensor:
    """Ids of the lexicon words of these categories that are one token, with the space before them."""
    lexicon = load_lexicon()
    ids = [tokenizer(f" {word.text}")["input_ids"] for category in categories for word in lexicon[category]]
    return torch.tensor(sorted({row[0] for row in ids if len(row) == 1}))


def learn_to_copy(model, tokenizer, optimizers: Optimizers, target: float, most: int = 4_000) -> None:
    """2 to 11 random words, repeated, 32 lists a step, until `target` of the repeats are right over 50 steps.

    The softmax is over the drill's words only: over the whole vocabulary the rows of all other words would shrink, and
    the stories would have to bring them back.
    """
    words = single_tokens(tokenizer, REMEMBERED)
    place = torch.full((len(tokenizer),), -1).index_put((words,), torch.arange(len(words)))
    right: list[float] = []
    optimizers.schedule(10**9)
    while sum(right[-50:]) < 50 * target:
        if len(right) == most:
            raise RuntimeError(f"copying not learnt in {most} drills: {sum(right[-50:]) / 50:.2f} right")
        period = int(torch.randint(2, 12, ()))
        ids = words[torch.randint(len(words), (32, period))].repeat(1, max(2, 24 // period))
        hidden = model.model(ids).last_hidden_state[:, period - 1 : -1]
        logits, labels = hidden @ model.lm_head.weight[words].T, place[ids[:, period:]]
        optimizers.step(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        right.append((logits.argmax(-1) == labels).float().mean().item())
        if len(right) % 100 == 0:
            print(f"drill {len(right)}: {sum(right[-50:]) / 50:.2f} copied", flush=True)


def collate(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded to the longest row; padding is not predicted."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = ids != pad
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def encode(tokenizer, seed: int, count: int) -> list[list[int]]:
    encoded = tokenizer.backend_tokenizer.encode_batch(list(stories(seed, count)))
    return [[*e.ids, tokenizer.eos_token_id] for e in encoded]


def train(args: StoryLMArguments) -> None:
    set_seed(args.seed)
    # A few extra counts, so that what a story is about is one token even where it is rare.
    remembered = (f" {word.text}" for category in REMEMBERED for word in load_lexicon()[category] for _ in range(20))
    tokenizer = train_tokenizer(itertools.chain(stories(args.seed, 20_000), remembered), args.vocab_size)
    model = build_model(args, tokenizer)
    rows = encode(tokenizer, args.seed, args.stories)
    print(f"{len(rows):,} stories, {sum(map(len, rows)):,} tokens, {model.num_parameters():,} parameters")
    optimizers = Optimizers(model, args)
    learn_to_copy(model, tokenizer, optimizers, args.copying)
    steps, start, losses = len(rows) // args.batch_size, time.time(), []
    optimizers.schedule(steps)
    for step in range(steps):
        if step % 8 == 0:  # stories of one length go together, 8 batches at a time: a tenth less padding
            chunk = sorted(rows[step * args.batch_size : (step + 8) * args.batch_size], key=len)
        batch = chunk[step % 8 * args.batch_size :][: args.batch_size]
        loss = model(**collate(batch, tokenizer.pad_token_id)).loss
        optimizers.step(loss)
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            minutes = (time.time() - start) / 60
            print(
                f"step {step + 1} of {steps}: loss {sum(losses[-200:]) / 200:.3f}, {minutes:.1f} minutes", flush=True
            )
    save(model, tokenizer, args.output_dir)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """Half-precision weights keep the folder under 4 MB; the config says float32, so they load as float32."""
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def held_out(model, tokenizer, count: int = 1_000) -> tuple[float, float]:
    """Mean negative log-likelihood in nats per token, and the share of names told again that the model has right (its
    likeliest token is the name), on stories from a seed that training never used."""
    names = single_tokens(tokenizer, ["child"])
    total, tokens, right, again = 0.0, 0, 0, 0
    rows = encode(tokenizer, HELD_OUT_SEED, count)
    for start in range(0, count, 100):
        batch = collate(rows[start : start + 100], tokenizer.pad_token_id)
        logits, ids = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").item()
        tokens += int(batch["attention_mask"][:, 1:].sum())
        earlier = ids[:, :, None].eq(ids[:, None, :]).tril(-1).any(-1)
        repeated = torch.isin(ids, names) & earlier
        right += int((logits.argmax(-1) == ids)[repeated].sum())
        again += int(repeated.sum())
    return total / tokens, right / again


def describe(path: str | Path, count: int = 200) -> dict:
    """What the embedded model must show, measured on `count` samples of 100 tokens."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    shown = judge(model, tokenizer, [PROMPT] * count, alliteration_reward)
    # A text cut at 100 tokens may end in half a word, which says nothing about spelling.
    words = [w for text in shown.completions for w in split_words(text.rpartition(" ")[0])]
    known = known_words()
    unknown = Counter(w for w in words if w not in known)
    whole = judge(model, tokenizer, [PROMPT] * 10, alliteration_reward, max_new_tokens=200, seed=1)
    loss, copied = held_out(model, tokenizer)
    return {
        "parameters": model.num_parameters(),
        "held_out_loss": loss,
        "names_right_percent": 100 * copied,
        "different": len(set(shown.completions)),
        "unknown_words_percent": 100 * sum(unknown.values()) / len(words),
        "unknown_examples": ", ".join(w for w, _ in unknown.most_common(8)),
        "alliteration_mean": shown.reward_mean,
        "entropy_per_token": shown.entropy_per_token,
        "ended_percent": 100 * shown.ended_share,
        "stories": whole.completions,
    }


def write_card(args: StoryLMArguments) -> None:
    facts = describe(args.output_dir)
    entries = sum(len(words) for words in load_lexicon().values())
    rows = {
        "different texts": f"{facts['different']} of 200",
        "names told again that are right (held-out stories)": f"{facts['names_right_percent']:.0f} %",
        "words that the corpus does not know": f"{facts['unknown_words_percent']:.2f} %",
        "alliterating pairs": f"{facts['alliteration_mean']:.2f} a text",
        "entropy": f"{facts['entropy_per_token']:.2f} nats per token",
        "texts that reach their end": f"{facts['ended_percent']:.0f} %",
    }
    card = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# The embedded story model

A Qwen2 of {facts["parameters"]:,} parameters that writes young children's stories. This project made it from stories
that this project wrote: {len(load_skeletons())} hand-written skeletons with slots for {entries:,}
lexicon entries (`stories/` and `lexicon.txt` in `../../lab/story_model/`), drawn by `corpus.py` there. To make it
again:

```
python -m kl_alliteration.lab.story_model.train
```

{args.stories:,} stories, each seen once, seed {args.seed}. Loss on 1,000 stories of
another seed: {facts["held_out_loss"]:.3f} nats per token. It knows these plots and these words, and nothing else.

200 samples of 100 tokens after "{PROMPT}", temperature 1, no truncation:

| what | measured |
|---|---|
""" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    card += "\n## Ten unselected samples, told to their end\n\n"
    card += "\n".join(f"{i}. {escaped(PROMPT + text)}" for i, text in enumerate(facts["stories"], 1)) + "\n"
    Path(args.output_dir, "README.md").write_text(card, encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in facts.items() if name != "stories"))


def main():
    (args,) = HfArgumentParser(StoryLMArguments).parse_args_into_dataclasses()
    if not args.card_only:
        start = time.time()
        train(args)
        print(f"trained in {(time.time() - start) / 60:.1f} minutes")
    write_card(args)


if __name__ == "__main__":
    main()
