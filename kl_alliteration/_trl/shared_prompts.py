"""Scoring without waste: each distinct prompt of a batch once, and the LM head only where a token is counted.

TRL scores rows of a left-padded prompt and a completion by `model(..., labels=labels, fused_lm_head=True)`; a label is
-100 where no log-probability is wanted. What stands before the first wanted column is a row's prompt here. Distinct
prompts go through the backbone alone. Their keys and values are repeated for the rows, which go on from there, and
carry gradients: the backward pass goes through each prompt once, too.
"""

from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..kl import distinct_prompts
from .proof import drops, rotary_by_length, some_that_share, what_differs

logger = logging.get_logger(__name__)

WORTH = 0.9  # of the tokens: where more of them are left, a second pass costs what it saves
CHECKED = 4  # rows of the first batch that are computed both ways
NEAR = 64  # tokens before and behind a prompt's end whose gradients are
KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache"}  # arguments of a backbone that is shared


class Unshareable(Exception):
    """Why a model's prompts are computed once per row."""


@dataclass
class Call:
    """A scoring call under way."""

    prompt: int  # columns before the first that is wanted: P
    wanted: torch.Tensor  # (B, T), of the columns behind them


class SharedPrompts:
    """Hooks on a causal language model with TRL's fused head. Sharing is off where it is not sure to be right.

    `FusedCausalLMOutput`, `fused_lm_head`, `labels` and `shift_labels` are those of `add_fused_lm_head` in
    `trl/trainer/utils.py` of trl 1.16.0.
    """

    def __init__(self, causal_lm):
        self.model, self.backbone = causal_lm, causal_lm.base_model
        self.call: Call | None = None
        self.proven: set[tuple[bool, bool, bool]] = set()  # with padding, with gradients, while training
        self.off: str | None = None  # why it is, for good
        self.said = False  # what gradient checkpointing does
        self.forward, self.backbone.forward = self.backbone.forward, self.forward_from_prompts
        eager = partial(torch.compiler.disable, recursive=False)  # what is asked of a batch's numbers
        self.model.register_forward_pre_hook(eager(self.begin), with_kwargs=True)
        self.model.register_forward_hook(eager(self.end), with_kwargs=True, always_call=True)
        self.backbone.register_forward_hook(eager(self.keep_wanted))

    def begin(self, model, args, kwargs):
        """Ask the LM head for the wanted tokens only, in one row."""
        labels = kwargs.get("labels")
        if args or labels is None or not kwargs.get("fused_lm_head") or kwargs.get("shift_labels") is not None:
            return None
        prompt = int((labels != -100).any(0).int().argmax())
        if prompt == 0:  # none is wanted, or nothing comes before the first
            return None
        labels = labels[:, prompt:]
        self.call = Call(prompt, labels != -100)
        return args, kwargs | {"labels": None, "shift_labels": labels[self.call.wanted].unsqueeze(0)}

    def end(self, model, args, kwargs, output):
        """The head's values, (1, N), in the places that they are of, (B, T)."""
        call, self.call = self.call, None
        if call is None or output is None:
            return None
        spread = {
            name: value.new_zeros(call.wanted.shape).masked_scatter(call.wanted, value)
            for name, value in output.items()
            if torch.is_tensor(value) and value.dim() == 2
        }
        return type(output)(**output | spread)

    def keep_wanted(self, backbone, args, output):
        """(B, T + 1, H) states, or of the prompt too, -> (1, N, H). The hooks before this one see all of them."""
        if self.call is not None:
            length = self.call.wanted.shape[1]
            output.last_hidden_state = output.last_hidden_state[:, -length - 1 : -1][self.call.wanted].unsqueeze(0)
        return output

    def forward_from_prompts(self, *args, **kwargs):
        """The backbone's `forward`. Where a scoring call shares prompts, its states start with the prompt's last."""
        if self.call is None or self.off:
            return self.forward(*args, **kwargs)
        asked = {name: value for name, value in kwargs.items() if value is not None}
        try:
            if unknown := asked.keys() - KNOWN:
                raise Unshareable(f"the model is called with {', '.join(sorted(unknown))}")
            prompt, (batch, length) = self.call.prompt, asked["input_ids"].shape
            row, first = distinct_prompts(asked["input_ids"][:, :prompt], asked["attention_mask"][:, :prompt])
            if len(first) * prompt + batch * (length - prompt) > WORTH * batch * length or self.checkpoints():
                return self.forward(*args, **kwargs)
            self.prove(row, asked)
            return self.shared(row, first, prompt, **asked)
        except Unshareable as reason:
            self.off = str(reason)
        logger.warning(f"prompts are computed once per completion, share_prompts is off: {self.off}")
        return self.forward(*args, **kwargs)

    def checkpoints(self) -> bool:
        """Whether this pass keeps no activations, and so no cache; TRL scores without that."""
        on = self.backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if on and not self.said:
            self.said = True
            logger.warning(
                "gradient checkpointing lets the loss share no prompts: set gradient_checkpointing=False, a shared "
                "prompt saves memory, too"
            )
        return on

    def shared(self, row, first, prompt: int, input_ids, attention_mask, position_ids=None, use_cache=None):
        """The backbone's output of B rows, from U distinct prompts: (B, T + 1, H) states, the prompt's last first."""

        def part(rows, columns):
            return {} if position_ids is None else {"position_ids": position_ids[rows, columns]}

        head, tail = slice(prompt), slice(prompt, None)
        of_prompts = self.forward(
            input_ids=input_ids[first, head],
            attention_mask=attention_mask[first, head],
            use_cache=True,
            **part(first, head),
        )
        # By its name in this transformers, the older one until 5.23.
        named = "cache" if "cache" in signature(self.forward).parameters else "past_key_values"
        cache = getattr(of_prompts, named, None)
        if cache is None:
            raise Unshareable("the model has no cache")
        odd = {
            type(layer).__name__
            for layer in getattr(cache, "layers", ())
            if not hasattr(layer, "batch_select_indices")
        }
        if odd:
            raise Unshareable(f"its cache cannot be repeated for the rows: it holds a {', '.join(sorted(odd))}")
        cache.batch_select_indices(row)
        output = self.forward(
            input_ids=input_ids[:, tail],
            attention_mask=attention_mask,
            use_cache=True,
            **{named: cache},
            **part(slice(None), tail),
        )
        last = of_prompts.last_hidden_state[row, -1:]
        return type(output)(last_hidden_state=torch.cat([last, output.last_hidden_state], dim=1))

    def prove(self, row: torch.Tensor, asked: dict) -> None:
        """`Unshareable` where a few rows of a first batch come out otherwise than alone, states or gradients."""
        prompt, graded = self.call.prompt, torch.is_grad_enabled()
        key = bool((asked["attention_mask"][:, :prompt] == 0).any()), graded, self.backbone.training
        if key in self.proven:
            return
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self.model.parameters()):
            raise Unshareable("the weights are sharded")
        if kind := rotary_by_length(self.model.config):  # which a short first batch would not show
            raise Unshareable(f"rotary positions of type {kind!r} change with the length of a text")
        if self.backbone.training and any(map(drops, self.model.modules())):
            raise Unshareable("dropout is on, and is drawn once per completion: set disable_dropout=True")
        rows, near = some_that_share(row, CHECKED), slice(max(0, prompt - NEAR), prompt + NEAR)
        try:
            with torch.no_grad():
                differs = self.differs(cut(asked, rows), prompt, [])
            if graded and not differs:  # near the prompt's end only: graphs of whole rows would be the peak of memory
                parameters = [p for p in self.model.parameters() if p.requires_grad]
                differs = self.differs(cut(asked, rows, near), prompt - near.start, parameters)
        except Unshareable:
            raise
        except Exception as error:
            differs = f"{type(error).__name__}: {error}"
        if differs:
            raise Unshareable(differs)
        self.proven.add(key)

    def differs(self, asked: dict, prompt: int, parameters: list[torch.Tensor]) -> str | None:
        alone = self.forward(**asked).last_hidden_state[:, prompt - 1 :]
        parts = distinct_prompts(asked["input_ids"][:, :prompt], asked["attention_mask"][:, :prompt])
        shared = self.shared(*parts, prompt, **asked).last_hidden_state
        seen = asked["attention_mask"][:, prompt - 1 :].bool()
        return what_differs(shared[seen], alone[seen], parameters)


def cut(asked: dict, rows: torch.Tensor, columns: slice = slice(None)) -> dict:
    """These rows and columns of a call's (B, L) tensors."""
    return {name: value[rows, columns] if torch.is_tensor(value) else value for name, value in asked.items()}
