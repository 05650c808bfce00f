"""The study's reward as a model: from token ids, on their device, in the shape of a reward model of TRL's.

    model = AlliterationRewardModel.from_tokenizer(tokenizer)
    model.save_pretrained("alliteration"); tokenizer.save_pretrained("alliteration")
    trainer = RLOOTrainer(..., reward_funcs="alliteration")  # or the object

Importing this module registers the model with transformers' `Auto` classes. What it learns from its tokenizer is which
bytes each token stands for; words, initials and pairs are then found as `str.split` and `str.lower` would find them.
"""

import json
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_outputs import SequenceClassifierOutput

CODE_POINTS = 0x110000


class AlliterationConfig(PreTrainedConfig):
    """Sizes of the tables: tokens, and bytes of all tokens together."""

    model_type = "alliteration"

    def __init__(self, vocab_size: int = 0, total_bytes: int = 0, **kwargs):
        self.vocab_size, self.total_bytes = vocab_size, total_bytes
        kwargs.setdefault("num_labels", 1)
        super().__init__(**kwargs)


class AlliterationRewardModel(PreTrainedModel):
    """`.logits` (B, 1): the alliterating pairs of each row of token ids, times `worth`.

    Equal to [`~rewards.alliteration_reward`] on every row that decodes to text. Special tokens are no text.
    """

    config_class = AlliterationConfig
    main_input_name = "input_ids"

    def __init__(self, config: AlliterationConfig):
        super().__init__(config)
        self.worth = nn.Parameter(torch.ones(1), requires_grad=False)  # of a pair
        self.register_buffer("token_bytes", torch.zeros(config.total_bytes, dtype=torch.uint8))
        self.register_buffer("first_byte", torch.zeros(config.vocab_size + 1, dtype=torch.int64))  # of each token
        self.post_init()

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "AlliterationRewardModel":
        """For a fast tokenizer whose tokens are bytes (GPT-2, Llama 3, Qwen) or pieces with `▁` (Llama 2, Gemma).

        Raises:
            `ValueError`: for another kind.
        """
        spelled = spell_tokens(tokenizer)
        ends = torch.tensor([0, *map(len, spelled)]).cumsum(0)
        config = AlliterationConfig(vocab_size=len(spelled), total_bytes=int(ends[-1]), name_or_path="alliteration")
        model = cls(config)
        model.token_bytes.copy_(torch.frombuffer(bytearray(b"".join(spelled)), dtype=torch.uint8))
        model.first_byte.copy_(ends)
        return model

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """`input_ids`, `attention_mask`: (B, T); 0 = no text."""
        batch, device = input_ids.shape[0], input_ids.device
        known = (input_ids >= 0) & (
            input_ids < len(self.first_byte) - 1
        )  # a model may have more ids than its tokenizer
        input_ids = input_ids.where(known, 0)
        lengths = (self.first_byte[input_ids + 1] - self.first_byte[input_ids]) * known  # (B, T) bytes of each token
        if attention_mask is not None:
            lengths = lengths * attention_mask
        ids, lengths_flat = input_ids.flatten(), lengths.flatten()
        before = lengths_flat.cumsum(0) - lengths_flat
        total = int(lengths_flat.sum())
        offsets = torch.repeat_interleave(self.first_byte[ids] - before, lengths_flat, output_size=total)
        text = self.token_bytes[offsets + torch.arange(total, device=device)].int()  # (N,) bytes of all rows
        row_ends = lengths.sum(1).cumsum(0)  # (B,)
        codes, leads = code_points(text)
        spaces, lower = character_tables(device)
        space = spaces[codes]
        # Whether the character before is a space; the bytes within a character take over what their first one is.
        for _ in range(0 if leads is None else 3):
            space = torch.where(leads, space, space.roll(1))
        after_space = space.roll(1)
        starts_of_rows = torch.cat([row_ends.new_zeros(1), row_ends[:-1]])
        after_space[starts_of_rows[starts_of_rows < total]] = True
        starts = ~space & after_space
        if leads is not None:
            starts &= leads
        words = starts.nonzero().squeeze(1)  # (W,) where a word starts
        rows = torch.bucketize(words, row_ends, right=True)
        initials = lower[codes[words]]
        pairs = (initials[1:] == initials[:-1]) & (rows[1:] == rows[:-1])
        counts = torch.zeros(batch, device=device).index_add_(0, rows[1:], pairs.float())
        return SequenceClassifierOutput(logits=(counts * self.worth.float()).unsqueeze(1))


def code_points(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """UTF-8 to code points at each character's first byte, (N,) -> (N,), and which bytes are first; `None`: all."""
    if not text.numel() or int(text.max()) < 0x80:
        return text, None
    following = [text.roll(-i) & 0x3F for i in (1, 2, 3)]
    two = (text & 0x1F) << 6 | following[0]
    three = (text & 0x0F) << 12 | following[0] << 6 | following[1]
    four = (text & 0x07) << 18 | following[0] << 12 | following[1] << 6 | following[2]
    codes = torch.where(text < 0xE0, two, torch.where(text < 0xF0, three, four))
    codes = torch.where(text < 0x80, text, codes).clamp(max=CODE_POINTS - 1)
    return codes, (text & 0xC0) != 0x80


@cache
def character_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For every code point: whether `str.split` splits there, and a number for its lower case."""
    if device.type != "cpu":
        return tuple(table.to(device) for table in character_tables(torch.device("cpu")))
    spaces = torch.zeros(CODE_POINTS, dtype=torch.bool)
    lower = torch.arange(CODE_POINTS, dtype=torch.int32)
    longer = {}  # lower cases of more than one character
    for code in range(CODE_POINTS):
        character = chr(code)
        if character.isspace():
            spaces[code] = True
        elif (small := character.lower()) != character:
            lower[code] = ord(small) if len(small) == 1 else longer.setdefault(small, CODE_POINTS + len(longer))
    return spaces, lower


def spell_tokens(tokenizer) -> list[bytes]:
    """The bytes of every token; none for special tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, got {type(tokenizer).__name__}")
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {part["type"] for part in (decoder, *decoder.get("decoders", ())) if part}
    if "ByteLevel" in kinds:
        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}

        def spell(token: str) -> bytes:
            known = all(character in to_byte for character in token)  # a token that was added may be any text
            return bytes(to_byte[character] for character in token) if known else token.encode(errors="replace")

    elif "Metaspace" in kinds or any(part.get("pattern") == {"String": "▁"} for part in decoder.get("decoders", ())):

        def spell(token: str) -> bytes:
            if "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode("utf-8", errors="replace")

    else:
        raise ValueError(
            f"tokenizer must be byte-level or have pieces with '▁'; {type(tokenizer).__name__} decodes with "
            f"{', '.join(sorted(kinds)) or 'nothing'}"
        )
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    spelled = [b""] * (max(vocabulary.values(), default=-1) + 1)  # ids may have gaps
    for token, index in vocabulary.items():
        if index not in special:
            spelled[index] = spell(token)
    return spelled


# With the code in the folder too, so that a program without this package loads it under `trust_remote_code`.
AlliterationConfig.register_for_auto_class()
AlliterationRewardModel.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register(AlliterationConfig.model_type, AlliterationConfig)
AutoModelForSequenceClassification.register(AlliterationConfig, AlliterationRewardModel)
