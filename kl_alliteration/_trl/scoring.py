"""Scores completions by policy, reference and base with TRL's own method, and keeps hidden states on request."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from trl.trainer.utils import use_adapter

from .. import kl
from .first_batch import is_due, say_what_differs
from .heads import OwnHead, beside, choose_head, linear_head
from .reference import load_reference, why_off_is_not_the_base
from .shared_prompts import SharedPrompts


@dataclass(frozen=True)
class Scored:
    """Log-probabilities (B, T), what TRL returned, the (B, T, H) states behind them, and their head."""

    logps: torch.Tensor
    results: tuple
    states: torch.Tensor | None
    head: kl.LMHead | OwnHead | None

    def with_reference(self, states: torch.Tensor | None, head: kl.LMHead | None) -> kl.HiddenStates | None:
        """Both models' states, where they were kept."""
        return None if self.states is None else kl.HiddenStates(self.states, states, self.head, head)


class Scorer:
    """Scores by the stock trainer's `_get_per_token_logps_and_entropies`; `asked` are that method's arguments."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.get_logps = trainer._get_per_token_logps_and_entropies
        self.at_beta_zero = False  # the reference too, though TRL asks for none
        self.with_base = False  # score with the adapter off too; the model has one
        self.checked: set[bool] = set()  # of batches with padding before prompts, and without: held against the model
        self.places = True  # give TRL's calls of the model the positions that `generate` counts, where it needs them
        self.own_reference = None  # a model that is loaded here, where TRL made none or not the right one
        self.truncate: Callable | None = None  # (N, V) logits -> the same, -inf where sampling leaves none; scored so
        self._head_of = choose_head(self._causal_lm(trainer.model), trainer.temperature)
        self._hooked: list[torch.nn.Module] = []  # backbones whose states are kept
        self._shared: dict[torch.nn.Module, SharedPrompts] | None = None  # by model, once prompts are shared
        self._states: list[torch.Tensor] | None = None  # of the forward pass under way, where anyone needs them
        if self.own_head:
            self.need_hidden_states()

    @property
    def own_head(self) -> bool:
        """Whether log-probabilities are computed here, since TRL's are not the model's."""
        return self._head_of is not linear_head

    @property
    def has_free_reference(self) -> bool:
        """With LoRA the reference is the model itself, adapter off."""
        return isinstance(self.trainer.accelerator.unwrap_model(self.trainer.model), PeftModel)

    @property
    def head_of_peft(self) -> bool:
        """Whether the LM head is in PEFT's `modules_to_save`."""
        return hasattr(self._causal_lm(self.trainer.model).get_output_embeddings(), "modules_to_save")

    def need_hidden_states(self, with_gradient: bool = False) -> None:
        """From here on scores come with hidden states; `with_gradient`: of the policy's head too, where it trains."""
        weight = self._causal_lm(self.trainer.model).get_output_embeddings().weight
        if with_gradient and weight.requires_grad and hasattr(weight, "ds_status"):
            raise ValueError(
                "DeepSpeed ZeRO-3 shards the LM head, whose gradient a full-vocabulary penalty in the loss needs: put "
                "it into the reward, or use LoRA, ZeRO-2 or FSDP2"
            )
        for causal_lm in self._models():
            # Refuses what it cannot read now, not in the first batch.
            self._head_of(causal_lm, self.trainer.temperature)
            if causal_lm.base_model not in self._hooked:
                self._hooked.append(causal_lm.base_model)
                # In front of the hook that leaves only the states that the head needs.
                causal_lm.base_model.register_forward_hook(torch.compiler.disable(self._keep_states), prepend=True)

    def share_prompts(self) -> None:
        """From here on every model that scores computes each distinct prompt of a call once."""
        self._shared = {} if self._shared is None else self._shared
        for causal_lm in self._models():
            if causal_lm not in self._shared:
                self._shared[causal_lm] = SharedPrompts(causal_lm)

    def need_reference_at_beta_zero(self) -> None:
        """Score with the reference even when `beta` is 0: free of memory with LoRA, else a second model is loaded."""
        self.at_beta_zero = True
        if self.trainer.beta == 0 and self.trainer.ref_model is None and not self.has_free_reference:
            self.load_reference()

    def load_reference(self, path: str | None = None, on_cpu: bool = False) -> None:
        """A second model, from the path of the first or from another: the reference from here on."""
        reference = load_reference(self.trainer, self._causal_lm(self.trainer.model), path, on_cpu)
        if self.trainer.ref_model is not None:
            self.trainer.ref_model = reference
        else:
            self.own_reference = reference
        if self._hooked:
            self.need_hidden_states()
        if self._shared is not None:
            self.share_prompts()

    def check_reference(self) -> None:
        """`ValueError` where the reference is the model with its adapter off, and that is not the base."""
        if self.own_reference is None and self.trainer.ref_model is None and self.has_free_reference:
            if reason := why_off_is_not_the_base(self.trainer.accelerator.unwrap_model(self.trainer.model)):
                raise ValueError(
                    f"with its adapter off this model is not its base: {reason}. Call "
                    "kl_alliteration.references.use_loaded_reference(trainer) first (in a recipe --kl_reference "
                    "loaded), which loads the base a second time"
                )

    def score(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs) -> Scored:
        self._states = [] if self._hooked else None
        results = self.get_logps(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        kept, self._states = self._states, None
        if kept is None:
            return Scored(results[0], results, None, None)
        states = torch.cat([s[:, -logits_to_keep - 1 : -1] for s in kept]).to(input_ids.device)
        head, logps = beside(self._head_of(self._causal_lm(model), self.trainer.temperature), states), results[0]
        if self.own_head:
            ids, mask = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:]
            logps = kl.from_hidden_states(sampled_logps, states, states.detach(), head, head, ids, mask)
        return Scored(logps, results, states, head)

    def score_checked(self, model, *asked, **kwargs) -> Scored:
        """The policy's score. The first one is held against what the model itself says: of text, not of images.

        And the first one with padding before a prompt, on all processes together.
        """
        scored = self.score(model, *asked, **kwargs)
        of_images = any(value is not None for name, value in kwargs.items() if "compute" not in name)
        if of_images or not is_due(self, *asked[1:3]):
            return scored
        if say_what_differs(self, model, scored.logps, *asked[:2], self.trainer.temperature):
            return scored
        for causal_lm in self._models():
            causal_lm.register_forward_pre_hook(self._place, with_kwargs=True)
        return self.score(model, *asked, **kwargs)

    @contextmanager
    def placed(self):
        """With the positions that `generate` counts, whatever TRL does otherwise."""
        before, self.places = self.places, True
        try:
            yield
        finally:
            self.places = before

    def _place(self, module, args, kwargs):
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
        whole = mask is not None and (ids is None or ids.shape == mask.shape)  # and no step from a cache
        if self.places and whole and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = kl.positions_of(mask)
        return args, kwargs

    def score_reference(self, model, *asked, **kwargs) -> Scored:
        ref_model = self.trainer.ref_model if self.own_reference is None else self.own_reference
        if ref_model is not None:
            return self.score(ref_model, *asked, **kwargs)
        unwrapped = self.trainer.accelerator.unwrap_model(model)
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            return self.score(model, *asked, **kwargs)

    def base_logps(self, model, *asked, **kwargs) -> torch.Tensor | None:
        """(B, T) with the adapter off, where anyone asked for the base beside the reference."""
        if not self.with_base:
            return None
        with use_adapter(self.trainer.accelerator.unwrap_model(model), adapter_name=None):
            return self.get_logps(model, *asked, **kwargs)[0]

    def rollout(self, policy: Scored, reference: Scored, input_ids, attention_mask, base_logps=None) -> kl.Rollout:
        """Both models' scores of the last T tokens."""
        length = policy.logps.shape[1]
        hidden = policy.with_reference(reference.states, reference.head)
        ids, mask = input_ids[:, -length:], attention_mask[:, -length:]
        return kl.Rollout(policy.logps, reference.logps, ids, mask, hidden, base_logps=base_logps)

    def _models(self) -> list:
        models = self.trainer.model, self.trainer.ref_model, self.own_reference
        return [self._causal_lm(model) for model in models if model is not None]

    def _causal_lm(self, model):
        model = self.trainer.accelerator.unwrap_model(model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _keep_states(self, module, args, output):
        if self._states is not None:
            self._states.append(output.last_hidden_state)


def sampled_logps(log_p: torch.Tensor, log_q: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """(N, V), (N, V), (N,) -> (N,), for `kl.from_hidden_states`."""
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
