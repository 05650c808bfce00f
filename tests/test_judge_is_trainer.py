"""What the judge hands to the model and to a reward is what the trainer hands them."""

import json

import pytest
from conftest import TINY_RUN, WORDS, word_tokenizer
from datasets import Dataset
from programs import run
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration.evaluation import ask_reward, judge
from kl_alliteration.lab.inputs import share_template_options
from kl_alliteration.lab.judging import judge_policy, total_reward
from kl_alliteration.lab.pairs import read_pairs, sample_pairs

# It writes the beginning of the text itself, and thinks where nobody says that it should not.
TEMPLATE = (
    "{% set start = 'was ' if enable_thinking is defined and not enable_thinking else 'sky ' %}{{ '<bos> ' }}"
    "{% for m in messages %}{{ (start if m['role'] == 'assistant' else '') + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ start }}{% endif %}"
)
CHAT = [{"role": "user", "content": "once upon a time"}]
QUIET = {"enable_thinking": False}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A folder: a tokenizer that adds `<bos>` to every text, and a template that writes one."""
    folder = tmp_path_factory.mktemp("chat")
    words = [*WORDS, "<bos>"]
    tokenizer = word_tokenizer(words, unk_token="<unk>", pad_token="<pad>")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", len(WORDS))]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=0, bos_token_id=len(WORDS), pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Recorded:
    """A reward that keeps what it is handed; the longer the better."""

    __name__ = "recorded"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, target, completion_ids, trainer_state, log_metric, log_extra, **columns):
        self.calls.append(
            {
                "prompts": prompts[0],
                "completions": type(completions[0]),
                "target": target[0],
                "ids": [ids[-1] == 0 or len(ids) for ids in completion_ids],
                "state": type(trainer_state).__name__,
                "columns": sorted(columns),
            }
        )
        log_metric("mine", 1.0)
        log_extra("mine", ["x"] * len(prompts))
        return [float(len(ids)) for ids in completion_ids]


def make(folder, tmp_path, reward, rows, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    dataset = Dataset.from_list(rows)
    args = RLOOConfig(**TINY_RUN | {"output_dir": str(tmp_path), "max_steps": 1} | options)
    share_template_options(dataset, args)
    kwargs = {"args": args, "train_dataset": dataset, "processing_class": tokenizer}
    return RLOOTrainer(model=str(folder), reward_funcs=reward, **kwargs)


def seen_prompts(trainer, monkeypatch) -> list[list[int]]:
    """The first row of tokens of every prompt batch that the model is asked, left padding taken off."""
    model, seen = trainer.accelerator.unwrap_model(trainer.model), []
    original = model.generate

    def generate(input_ids, attention_mask, **kwargs):
        seen.append(input_ids[0][attention_mask[0].bool()].tolist())
        return original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    return seen


@pytest.mark.parametrize(
    ("row", "ends"),
    [
        ({"prompt": "once upon a time", "target": "a"}, "<bos> once upon a time"),
        ({"prompt": CHAT, "target": "a"}, "<bos> once upon a time sky"),
        ({"prompt": CHAT, "target": "a", "chat_template_kwargs": QUIET}, "<bos> once upon a time was"),
    ],
    ids=["plain", "chat", "no thinking"],
)
def test_the_same_prompt_and_the_same_columns(chat_model, tmp_path, monkeypatch, row, ends):
    reward = Recorded()
    trainer = make(chat_model, tmp_path, reward, [row] * 8)
    seen = seen_prompts(trainer, monkeypatch)
    judged = judge_policy(trainer, 3, total_reward(trainer), 6, 1.0, adapted=False)
    trainer.train()
    before, training = reward.calls
    assert seen[0] == seen[1] and trainer.processing_class.decode(seen[0]) == ends
    assert {k: v for k, v in before.items() if k != "ids"} == {k: v for k, v in training.items() if k != "ids"}
    assert before["prompts"] == row["prompt"] and before["target"] == "a" and before["state"] == "TrainerState"
    assert before["completions"] is (str if isinstance(row["prompt"], str) else list)
    assert set(before["ids"]) <= {True, 6}  # to the end of text and no further
    assert judged.reward_mean == judged.mean_length
    assert [entry.get("mine") for entry in trainer.state.log_history if "reward" in entry] == [1.0]


def test_what_a_judge_says_is_not_in_the_trainer_s_log(chat_model, tmp_path):
    trainer = make(chat_model, tmp_path, Recorded(), [{"prompt": CHAT, "target": "a"}] * 8)
    judge_policy(trainer, 3, total_reward(trainer), 6, 1.0, adapted=False)
    assert not trainer._pending_metrics and not trainer._pending_extra_logs


def test_an_async_reward_and_a_reward_that_does_not_apply(tiny_model, tmp_path):
    """By hand: 2 times the length where it is odd, and the mean is over those."""

    async def odd(completions, completion_ids, **kwargs):
        return [float(len(ids)) if len(ids) % 2 else None for ids in completion_ids]

    trainer = make(tiny_model, tmp_path, odd, [{"prompt": "once upon a time"}] * 8, reward_weights=[2.0])
    lengths = []

    def reward(**asked):
        lengths.extend(map(len, asked["completion_ids"]))
        return total_reward(trainer)(**asked)

    found = judge_policy(trainer, 40, reward, 6, 1.0, adapted=False)
    counted = [2.0 * n for n in lengths if n % 2]
    assert 0 < len(counted) < 40 and found.reward_mean == pytest.approx(sum(counted) / len(counted))


def test_rows_whose_template_options_differ_are_refused(chat_model, tmp_path):
    rows = [{"prompt": CHAT, "chat_template_kwargs": {"enable_thinking": bool(i)}} for i in range(2)]
    with pytest.raises(ValueError, match="^dataset_name: the rows of `chat_template_kwargs` differ"):
        make(chat_model, tmp_path, Recorded(), rows)


def test_pairs_are_asked_for_as_dpo_asks(chat_model, tmp_path, monkeypatch):
    """Sampled prompts, DPO's own prompts and its judge's are one; `target` and the template's options travel along."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model, padding_side="left")
    model, seen = AutoModelForCausalLM.from_pretrained(chat_model).eval(), []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: seen.append(kw["input_ids"][0].tolist()) or original(**kw))
    reward = Recorded()
    columns = {"target": ["a"] * 2, "chat_template_kwargs": [QUIET] * 2}
    pairs = sample_pairs(model, tokenizer, [CHAT] * 2, reward, 4, 1, 6, columns=columns)
    assert tokenizer.decode(seen[0]) == "<bos> once upon a time was"
    assert reward.calls[0]["completions"] is list and reward.calls[0]["target"] == "a"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dataset = read_pairs(tmp_path / "pairs.jsonl")
    options = {k: v for k, v in TINY_RUN.items() if k not in ("num_generations", "max_completion_length")}
    args = DPOConfig(**options | {"output_dir": str(tmp_path)})
    trainer = DPOTrainer(model=str(chat_model), args=args, train_dataset=dataset, processing_class=tokenizer)
    assert trainer.train_dataset[0]["prompt_ids"] == seen[0]
    again = seen_prompts(trainer, monkeypatch)
    judge_policy(trainer, 2, reward, 6, 1.0, adapted=False)
    assert again == [seen[0]] and reward.calls[-1]["target"] == "a"


def test_the_library_s_judge_takes_conversations_and_columns(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model, padding_side="left")
    reward, model, seen = Recorded(), AutoModelForCausalLM.from_pretrained(chat_model), []
    generate = model.generate
    model.generate = lambda input_ids, **options: seen.append(input_ids) or generate(input_ids=input_ids, **options)
    found = judge(model, tokenizer, [CHAT] * 3, reward, 6, columns={"target": [*"abc"]})
    assert tokenizer.batch_decode(seen[0]) == ["<bos> once upon a time sky"] * 3  # by the template
    assert found.prompts == ["user: once upon a time\nassistant: "] * 3 and reward.calls[0]["target"] == "a"
    assert reward.calls[0]["state"] == "TrainerState"


def test_a_function_that_takes_less_gets_what_it_takes():
    def reward(prompts, completions, target):
        return [1.0, None]

    rows = [{"prompt": "a", "target": "b", "more": "c"}] * 2
    first, second = ask_reward(reward, rows, ["x", "y"], [[1], [2]])
    assert first == 1.0 and second != second


def test_a_recipe_with_a_reward_that_needs_a_column(tmp_path, chat_model):
    (tmp_path / "mine.py").write_text(
        "def matches(completions, target, completion_ids, trainer_state, **kw):\n"
        "    assert isinstance(completions[0], list)\n"
        "    return [float(len(ids)) for ids, wanted in zip(completion_ids, target, strict=True)]\n"
    )
    row = {"prompt": CHAT, "target": "tree", "chat_template_kwargs": QUIET}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    words = "--max_steps 1 --num_generations 4 --per_device_train_batch_size 4 --max_completion_length 6"
    words += " --eval_stories 4 --logging_steps 1 --report_to none --show_stories_every 0 --output_dir out"
    options = "--model_name_or_path", chat_model, "--dataset_name", "rows.jsonl", "--reward_funcs", "mine.matches"
    run("rloo_tall_tree.py", *words.split(), *options, cwd=tmp_path)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["before"]["reward_mean"] == summary["before"]["mean_length"]
    assert summary["stories"][0].startswith("user: once upon a time\nassistant: ")
