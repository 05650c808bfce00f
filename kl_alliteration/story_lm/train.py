"""Make the embedded story model again: corpus from a seed, tokenizer, pretraining, card.

    python -m kl_alliteration.story_lm.train    # into kl_alliteration/story_lm/model
    python -m kl_alliteration.story_lm.train --help

The corpus is never written to disk: `corpus.py` draws every story once, so there are no epochs. Held-out stories come
from another seed; they share skeletons and words with the training stories, as everything the model will ever be asked
to write does, but no story.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..evaluation import judge
from ..rewards import alliteration_reward
from . import MODEL_PATH, PROMPT
from .corpus import known_words, load_lexicon, load_skeletons, split_words, stories

HELD_OUT_SEED = 1_000_003


@dataclass
class StoryLMArguments:
    """What makes the embedded model; the defaults made the one that is shipped."""

    output_dir: str = field(default=str(MODEL_PATH), metadata={"help": "Folder for weights, tokenizer and card."})
    seed: int = field(default=0, metadata={"help": "Seed of the corpus, the initial weights and the order."})
    stories: int = field(default=60_000, metadata={"help": "Stories to train on, each seen once."})
    vocab_size: int = field(default=4_096, metadata={"help": "Byte-level BPE vocabulary, special tokens included."})
    hidden_size: int = field(default=144, metadata={"help": "Width of the Llama."})
    intermediate_size: int = field(default=432, metadata={"help": "Width of its feed-forward layers."})
    layers: int = field(default=4, metadata={"help": "Depth of the Llama."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    batch_size: int = field(default=64, metadata={"help": "Stories per optimizer step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak of the cosine schedule (AdamW)."})
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


def build_model(args: StoryLMArguments, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Collator:
    """Right-pads to the longest story of the batch; padding is not predicted."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), length), self.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask = ids != self.pad_token_id
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def train(args: StoryLMArguments) -> None:
    set_seed(args.seed)
    tokenizer = train_tokenizer(stories(args.seed, 20_000), args.vocab_size)
    model = build_model(args, tokenizer)
    encoded = tokenizer.backend_tokenizer.encode_batch(list(stories(args.seed, args.stories)))
    rows = [{"input_ids": [*e.ids, tokenizer.eos_token_id]} for e in encoded]
    tokens = sum(len(row["input_ids"]) for row in rows)
    print(f"{len(rows):,} stories, {tokens:,} tokens, {model.num_parameters():,} parameters")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.train()
    save(model, tokenizer, args.output_dir)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """Half-precision weights keep the folder under 4 MB; the config says float32, so they load as float32."""
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.config.use_cache = True
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def held_out_loss(model, tokenizer, count: int = 1_000) -> float:
    """Mean negative log-likelihood in nats per token of stories from a seed that training never used."""
    total, tokens = 0.0, 0
    ids = [tokenizer(text)["input_ids"] for text in stories(HELD_OUT_SEED, count)]
    collate = Collator(tokenizer.pad_token_id)
    for start in range(0, count, 100):
        batch = collate([{"input_ids": [*row, tokenizer.eos_token_id]} for row in ids[start : start + 100]])
        n = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * n
        tokens += n
    return total / tokens


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
    return {
        "parameters": model.num_parameters(),
        "held_out_loss": held_out_loss(model, tokenizer),
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

A Llama of {facts["parameters"]:,} parameters that writes young children's stories. This project made it from stories
that this project wrote: {len(load_skeletons())} hand-written skeletons (`../stories/`) with slots for {entries:,}
lexicon entries (`../lexicon.txt`), drawn by `../corpus.py`. To make it again, in under 30 minutes on two cores:

```
python -m kl_alliteration.story_lm.train
```

{args.stories:,} stories, each seen once, seed {args.seed}. Loss on 1,000 stories of
another seed: {facts["held_out_loss"]:.3f} nats per token. It knows these plots and these words, and nothing else.

200 samples of 100 tokens after "{PROMPT}", temperature 1, no truncation:

| what | measured |
|---|---|
""" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    card += "\n## Ten unselected samples, told to their end\n\n"
    card += "\n".join(f"{i}. {PROMPT}{text}" for i, text in enumerate(facts["stories"], 1)) + "\n"
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
