"""Read a trained model: stories with their alliterations marked; of an adapter, with it on and off side by side.

python recipes/tell_stories.py --model_name_or_path runs/tall_tree
python recipes/tell_stories.py --model_name_or_path user/adapter --stories 5 --prompt "Once there was"
"""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, HfArgumentParser

from kl_alliteration import alliteration_reward, judge
from kl_alliteration.adapters import is_adapter, load_adapter, tokenizer_of
from kl_alliteration.lab.checks import check_model_path
from kl_alliteration.lab.gguf import as_folder
from kl_alliteration.lab.progress import shown
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.story_lm import MODEL_PATH, PROMPT
from kl_alliteration.text import alliterating_words


@dataclass
class Arguments:
    model_name_or_path: str = field(default=str(MODEL_PATH), metadata={"help": "Model or adapter, folder or Hub id."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "An adapter's base, where it is not the one that it names."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not the model's own."}
    )
    prompt: str = field(default=PROMPT, metadata={"help": "What every story starts with."})
    chat: bool = field(default=False, metadata={"help": "The prompt is a user's message, by the chat template."})
    stories: int = field(default=3, metadata={"help": "Stories to write."})
    max_new_tokens: int = field(default=100, metadata={"help": "Tokens after the prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


def marked(text: str) -> Text:
    words = [shown(word, "bold yellow" if pairs else "") for word, pairs in alliterating_words(text)]
    return Text(" ").join(words)


@one_line_errors
def main():
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    if args.stories < 1:
        raise ValueError(f"stories must be >= 1, got {args.stories}")
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {args.max_new_tokens}")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {args.temperature}")
    if not args.prompt.strip():
        raise ValueError("prompt must not be empty")
    check_model_path("model_name_or_path", args.model_name_or_path)
    name = as_folder(args.model_name_or_path)
    adapter = is_adapter(name)
    model = load_adapter(name, args.base_model_name_or_path) if adapter else AutoModelForCausalLM.from_pretrained(name)
    tokenizer = tokenizer_of(args.tokenizer_name_or_path or name, model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}

    def tell():
        prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
        return judge(model, tokenizer, [prompt] * args.stories, alliteration_reward, **options)

    columns = {"adapter on" if adapter else name: tell()}
    if adapter:
        with model.disable_adapter():
            columns["adapter off"] = tell()
    table = Table(show_lines=True)
    for heading, found in columns.items():
        table.add_column(f"{heading}: {found.reward_mean:.1f} pairs a story", overflow="fold")
    for texts in zip(*(found.texts for found in columns.values()), strict=True):
        table.add_row(*map(marked, texts))
    Console().print(table)


if __name__ == "__main__":
    main()
