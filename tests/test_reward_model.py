"""The reward model against the text reward, token for token."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from kl_alliteration.rewards.reward_model import AlliterationRewardModel, spell_tokens
from kl_alliteration.story_lm import MODEL_PATH
from kl_alliteration.text import count_alliterations

TEXTS = ["Once upon a time the tall tall tree tried to touch the top of the sky", "Éva écrit des étés, 🌳 🌳 🌲 naïve"]


def byte_level():
    """As GPT-2's: bytes, a space at the word's front, no normalization."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def pieces():
    """As Llama 2's: `▁` for a space, bytes for what has no piece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:1] * 3, trainer)
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "embedded": AutoTokenizer.from_pretrained(MODEL_PATH),
    "byte level": byte_level(),
    "pieces": pieces(),
}
MODELS = {name: AlliterationRewardModel.from_tokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}
WORDS = ["tall", "Tree", "écrit", "Éva", "🌳", "İx", "ix", "\u2003", "to\x1cto", "ß"]
PHRASES = st.lists(st.sampled_from(WORDS)).map(" ".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.one_of(st.text(), PHRASES), min_size=1, max_size=4))
def test_equals_the_text_reward_on_all_that_decodes(name, texts):
    tokenizer, model = TOKENIZERS[name], MODELS[name]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    ids, mask = batch["input_ids"].long(), batch["attention_mask"].long()
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (len(texts), 1)
    assert logits[:, 0].tolist() == [count_alliterations(text) for text in decoded]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_padding_is_no_text(name):
    tokenizer, model = TOKENIZERS[name], MODELS[name]
    ids = torch.tensor([tokenizer("tall tree tried", add_special_tokens=False)["input_ids"]])
    padded = torch.cat([ids, ids], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    assert model(padded, mask).logits.item() == 2
    assert model(torch.cat([mask[:, :0], ids], dim=1)).logits.item() == 2


def test_rows_do_not_touch():
    tokenizer, model = TOKENIZERS["byte level"], MODELS["byte level"]
    ids = tokenizer(["a tree", "tall", "tall", "tall"], padding=True, padding_side="right", return_tensors="pt")
    assert model(ids["input_ids"].long(), ids["attention_mask"].long()).logits[:, 0].tolist() == [0, 0, 0, 0]


def test_bytes_of_tokens_by_hand():
    spelled = spell_tokens(TOKENIZERS["pieces"])
    vocab = TOKENIZERS["pieces"].get_vocab()
    assert spelled[vocab["</s>"]] == b""
    assert spelled[vocab["▁t"]] == b" t" and spelled[vocab["<0xC3>"]] == b"\xc3"


def test_a_folder_is_a_reward_model_of_trl(tmp_path, make_trainer):
    """Stock TRL loads it by path, and its own tokenizer reads the policy's text."""
    folder = tmp_path / "alliteration"
    MODELS["byte level"].save_pretrained(folder)
    TOKENIZERS["byte level"].save_pretrained(folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert torch.equal(loaded.token_bytes, MODELS["byte level"].token_bytes)
    seen = []

    def text_reward(prompts, completions, **kwargs):
        seen.append([p + c for p, c in zip(prompts, completions, strict=True)])
        return [float(count_alliterations(text)) for text in seen[-1]]

    trainer = make_trainer(reward_funcs=[str(folder), text_reward], max_steps=2)
    trainer.train()
    last = list(trainer._logs["rewards"].values())
    assert list(last[0]) == list(last[1]) and max(last[0]) > 0
    trainer = make_trainer(
        reward_funcs=[MODELS["pieces"]], reward_processing_classes=[TOKENIZERS["pieces"]], max_steps=1
    )
    trainer.train()
    (name,) = trainer._logs["rewards"]
    texts = [p + c for p, c in zip(trainer._logs["prompt"], trainer._logs["completion"], strict=True)]
    assert list(trainer._logs["rewards"]["alliteration"]) == [count_alliterations(text) for text in texts]


def test_another_kind_of_tokenizer_is_refused(tiny_model):
    with pytest.raises(ValueError, match="must be byte-level or have pieces with '▁'"):
        AlliterationRewardModel.from_tokenizer(AutoTokenizer.from_pretrained(tiny_model))
