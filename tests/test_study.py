"""`recipes/study_33m.yaml` against the study's loop, written here again: same tokens in, same update out."""

from itertools import pairwise

import pytest
import torch
from conftest import word_tokenizer
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM, set_seed
from trl import ModelConfig, RLOOConfig, RLOOTrainer

from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.lab.run import build_trainer
from kl_alliteration.lab.sweep import ROOT

STUDY_LEARNING_RATE, STUDY_BETA, GROUP, TOKENS = 1e-4, 40, 10, 100
FASTER = 300  # both learning rates: in float32 an update of 1e-8 cannot be told to five digits


def tiny_gpt_neo(folder):
    words = ["<eos>", "once", "upon", "a", "time", *(f"{letter}{i}" for letter in "stwb" for i in range(24))]
    word_tokenizer(words).save_pretrained(folder)
    set_seed(0)
    config = GPTNeoConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128,
        window_size=16,
        bos_token_id=None,
        eos_token_id=0,
    )
    GPTNeoForCausalLM(config).save_pretrained(folder)
    return words


def study_update(policy, reference, texts, words, learning_rate: float) -> None:
    """Ten texts of 100 tokens: mean cross-entropies, the penalty between them, leave-one-out, one step of SGD."""
    rewards = []
    for ids in texts:
        with torch.no_grad():
            ours, theirs = (model(ids[None], labels=ids[None]).loss.item() for model in (policy, reference))
        initials = [words[i][0] for i in ids]
        rewards.append(sum(a == b for a, b in pairwise(initials)) - STUDY_BETA * (theirs - ours))
    policy.zero_grad()
    for i, ids in enumerate(texts):
        baseline = (sum(rewards) - rewards[i]) / (GROUP - 1)
        ((rewards[i] - baseline) * policy(ids[None], labels=ids[None]).loss).backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= learning_rate * parameter.grad


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")  # the study samples with top_k 50
def test_the_same_tokens_give_the_study_s_update(tmp_path):
    words = tiny_gpt_neo(tmp_path / "model")
    parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), defaults=ROOT / "recipes/study_33m.yaml")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    options += ["--prompt", "once upon a time ", "--max_steps", "3", "--generation_kwargs", '{"min_new_tokens": 96}']
    args, training_args, model_args = parse_recipe(parser, [*options, "--report_to", "none", "--save_strategy", "no"])
    assert abs(training_args.learning_rate / (STUDY_LEARNING_RATE * GROUP / 99) - 1) < 1e-9
    training_args.learning_rate *= FASTER
    trainer = build_trainer(RLOOTrainer, args, training_args, model_args)
    batches, generate = [], trainer._generate_and_score_completions

    def spy(inputs):
        output = generate(inputs)
        batches.append(torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1))
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()

    start, policy = (AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval() for _ in range(2))
    for texts in batches:
        assert texts.shape == (GROUP, TOKENS)
        study_update(policy, start, texts, words, STUDY_LEARNING_RATE * FASTER)
    weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (trainer.model, policy, start)]
    ours, study = weights[0] - weights[2], weights[1] - weights[2]
    assert study.norm() > 0.01
    assert (ours - study).norm() / study.norm() < 1e-5
