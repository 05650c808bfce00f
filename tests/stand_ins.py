"""Stand-ins for what TRL's tests load from the Hub: random models with a small vocabulary, and a data set of prompts.

Folders of the same relative names, found by `from_pretrained` and `load_dataset` in the folder that pytest runs in.
Text only: vision models have none. Ids of Qwen2.5 that the tests write out are renumbered in a copy of the tests.

As a plugin of pytest: training on CPUs, and at most 4 steps where a test does not count them.
"""

import functools
import json
import re
from importlib.resources import files
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, RLOOConfig

HUB = "trl-internal-testing"
PROMPTS = (
    "Beautiful is better than|Explicit is|Simple is better|Complex|Flat is better than|Sparse is better|Readability|"
    "Special cases aren't special|Although practicality beats|Errors should never|Unless explicitly|"
    "In the face of ambiguity, refuse|There should be one|Although that way may not be|Now is|Although never is often|"
    "If the implementation is hard|If the implementation is easy|Namespaces are one"
).split("|")
# Qwen2.5's tokens that the tests write out as ids. `Ġ` is a space, `Ċ` the end of a line.
PIECES = (
    '293:Ġb 314:Ġ{ 330:Ġ" 397:>Ċ 450:dec 497:", 522:</ 606:name 788:": 894:Ġany 944:\'t 1414:Ġknow 1513:Ġdon '
    '4913:{" 5212:Ġ{" 5392:Ġtool 6659:call 7692:async 9520:step 11248:}}Ċ 13477:rement 14172:tool 16252:Ġincrement '
    "2765:Ġwon 16370:arguments 17453:Done 22785:_tool 35744:increment 64648:multiply 93054:_multiply"
)
PIECES = dict(piece.split(":", 1) for piece in PIECES.split(" "))
SPECIAL = {"151643": "<|endoftext|>", "151645": "<|im_end|>", "151657": "<tool_call>", "151658": "</tool_call>"}
MORE = ["<|im_start|>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|finetune_right_pad_id|>"]
SIZE = 2048
NUMBERS = {old: SIZE + n for n, old in enumerate(SPECIAL)} | {old: 1000 + n for n, old in enumerate(PIECES)}
PAD, EOS, VOCABULARY = NUMBERS["151643"], NUMBERS["151645"], SIZE + len(SPECIAL) + len(MORE)
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 32, "vocab_size": VOCABULARY}
SMALL |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "head_dim": 8, "chunk_size": 8}
MAMBA |= {"mamba_num_heads": 2, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "n_routed_experts": 4}
MAMBA |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
# Name of the stand-in: its class of configuration, its chat template, what is not small in the usual way.
MODELS = {
    "Qwen2ForCausalLM-2.5": ("Qwen2", "qwen2_5", {}),
    "Qwen2ForSequenceClassification-2.5": ("Qwen2", "qwen2_5", {"num_labels": 1}),
    "Qwen3ForCausalLM": ("Qwen3", "qwen3", {"head_dim": 8}),
    "Qwen3ForSequenceClassification": ("Qwen3", "qwen3", {"head_dim": 8, "num_labels": 1}),
    "Qwen3MoeForCausalLM": ("Qwen3Moe", "qwen3", {"head_dim": 8} | EXPERTS),
    "LlamaForSequenceClassification-3.2": ("Llama", "llama3_2", {"num_labels": 1}),
    "Gemma2ForCausalLM": ("Gemma2", "gemma", {"head_dim": 8}),
    "Cohere2ForCausalLM": ("Cohere2", "cohere2", {}),
    "Glm4MoeForCausalLM": ("Glm4Moe", "glm4moe", {"head_dim": 8, "n_routed_experts": 4} | EXPERTS),
    "GptOssForCausalLM": ("GptOss", "gptoss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "NemotronHForCausalLM-nano": ("NemotronH", "nemotron_3_nano", MAMBA),
}
REMOTE = """from transformers import Qwen2Config, Qwen2ForCausalLM


class RemoteConfig(Qwen2Config):
    model_type = "remote"


class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig
"""


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes one by one, and the tokens that the tests use; the rest are words of letters."""
    marks = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte]
    letters = [chr(byte) for byte in marks] + [chr(256 + n) for n in range(256 - len(marks))]
    vocabulary = {letter: n for n, letter in enumerate(letters)} | {word: NUMBERS[old] for old, word in PIECES.items()}
    for n in sorted(set(range(SIZE)) - set(vocabulary.values())):
        vocabulary["".join("abcdefghijklmnop"[int(digit, 16)] for digit in f"{n:x}") + "Ġ"] = n
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL.values(), *MORE])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = (files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    return made


def make_model(name: str, folder: Path) -> None:
    kind, template, more = MODELS.get(name, MODELS["Qwen2ForCausalLM-2.5"])
    config = getattr(transformers, f"{kind}Config")(**SMALL | more)
    head = "ForSequenceClassification" if "num_labels" in more else "ForCausalLM"
    for part in (getattr(transformers, kind + head)(config), tokenizer(template)):
        part.save_pretrained(folder)
    if name == "RemoteForCausalLM":
        (folder / "remote.py").write_text(REMOTE)
        classes = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
        config = {"model_type": "remote", "architectures": [name], "auto_map": classes}
        config = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(config))


def make_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    head = ["---", "configs:"]
    for name in ("standard_prompt_only", "conversational_prompt_only"):
        head += [f"- config_name: {name}", "  data_files:"]
        for split, texts in (("train", PROMPTS[:17]), ("test", PROMPTS[17:])):
            rows = texts if name.startswith("s") else [[{"role": "user", "content": text}] for text in texts]
            (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
            head += [f"  - split: {split}", f"    path: {name}_{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))


def make(source: Path, where: Path) -> None:
    """A copy of a source tree's tests in `where`, renumbered, and beside it what stands in for what they name."""
    (where / "tests").mkdir()
    named = set()
    for test in (source / "tests").glob("*.py"):
        text = re.sub(r"\b\d{3,6}\b(?=[,\]])", lambda found: str(NUMBERS.get(found[0], found[0])), test.read_text())
        named |= set(re.findall(rf"{HUB}/tiny-([\w.-]+)", text))
        (where / "tests" / test.name).write_text(text)
    for name in named & {*MODELS, "RemoteForCausalLM"}:
        make_model(name, where / HUB / f"tiny-{name}")
    make_data(where / HUB / "zen")


def on_cpus(make):
    @functools.wraps(make)
    def made(config, *args, **kwargs):
        steps = {} if "steps_per_generation" in kwargs else {"max_steps": 4}
        make(config, *args, **{"use_cpu": True, "bf16": False} | steps | kwargs)

    return made


def pytest_configure():
    for config_class in (GRPOConfig, RLOOConfig):
        config_class.__init__ = on_cpus(config_class.__init__)
