"""A model that sees: the KL of a tiny Llava is that of its own logits, images included, for RLOO and GRPO."""

import warnings

import pytest
import torch
from conftest import word_tokenizer
from datasets import Dataset
from families import VOCAB, move
from runs import PROMPTS, WORDS, stock_trainer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from truth import GRPOOracle, Oracle, log_probs

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback
from kl_alliteration.kl import KLWarning

SIDE, PATCH = 16, 8  # pixels: four patches an image
TEMPLATE = """{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}
{% else %}{% for part in message['content'] %}
{% if part['type'] == 'image' %} <image> {% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endif %}{% endfor %}"""


def processor():
    pytest.importorskip("PIL")
    import transformers
    from transformers import LlavaProcessor

    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)  # without torchvision
    tokenizer = word_tokenizer([*WORDS[:-1], "<image>"], unk_token="<unk>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        image_processor=images(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder of a random Llava of two layers on either side."""
    ends = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, image_size=SIDE, patch_size=PATCH, projection_dim=16, **sizes
        ),
        text_config=LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, **ends, **sizes),
        image_token_id=VOCAB - 1,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    set_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    return folder


def pictures() -> list:
    import numpy
    from PIL import Image

    rows = numpy.random.default_rng(0)
    return [Image.fromarray(rows.integers(0, 255, (SIDE, SIDE, 3), dtype=numpy.uint8)) for _ in PROMPTS]


def by_length(completions, **kwargs):
    return [float(len(completion[0]["content"].split())) for completion in completions]


RLOO, GRPO = (RLOOTrainer, RLOOConfig), (GRPOTrainer, GRPOConfig)
EXACT = KLPenalty("exact", "both")


@pytest.mark.parametrize(
    ("kind", "penalty"), [(RLOO, EXACT), (GRPO, None), (GRPO, EXACT)], ids=["rloo", "grpo watched", "grpo"]
)
def test_the_kl_sees_the_images(llava, kind, penalty):
    rows = [
        {"prompt": [{"role": "user", "content": text}], "image": image}
        for text, image in zip(PROMPTS * 2, pictures() * 2, strict=True)
    ]
    trainer = stock_trainer(
        llava, by_length, *kind, train_dataset=Dataset.from_list(rows), processing_class=processor()
    )
    move(trainer.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KLWarning)  # of the temperature
        if penalty is not None:
            trainer.add_callback(KLPenaltyCallback(trainer, penalty))
        trainer.add_callback(KLMonitorCallback(trainer, exact=True))
        oracle = (GRPOOracle if kind is GRPO and penalty is not None else Oracle)(trainer, penalty)
        trainer.train()
    assert oracle.exact_per_token > 0.01 and max(oracle.worst.values()) < 1e-3, oracle.worst
    output = trainer._generate_and_score_completions(rows[:4])
    with torch.no_grad():
        seen, blind = (
            log_probs(trainer.model, output | {"pixel_values": pixels}, 1.0)
            for pixels in (output["pixel_values"], torch.zeros_like(output["pixel_values"]))
        )
    assert (seen - blind).abs().max() > 0.1  # what a score without images would be off by
