"""What scores completions: policy, reference and base by TRL's own method, with the hidden states where asked."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    use_adapter,
)

from .. import kl


@dataclass(frozen=True)
class Scored:
    """TRL's log-probabilities (B, T), whatever else it returns, the (B, T, H) states behind them, and their head."""

    logps: torch.Tensor
    others: tuple
    states: torch.Tensor | None
    head: kl.LMHead | None

    @property
    def results(self) -> tuple:
        """As TRL's method returns them."""
        return self.logps, *self.others

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
        self._ref_model = None  # only where TRL itself made none
        self._hooked: list[torch.nn.Module] = []  # backbones whose states are kept
        self._states: list[torch.Tensor] | None = None  # of the forward pass under way, where anyone needs them

    @property
    def has_free_reference(self) -> bool:
        """With LoRA the reference is the model itself, adapter off."""
        return isinstance(self.trainer.accelerator.unwrap_model(self.trainer.model), PeftModel)

    def need_hidden_states(self, with_gradient: bool = False) -> None:
        """From here on scores come with hidden states; `with_gradient`: of the policy's head too, where it trains."""
        weight = self._causal_lm(self.trainer.model).get_output_embeddings().weight
        if with_gradient and weight.requires_grad and hasattr(weight, "ds_status"):
            raise ValueError(
                "DeepSpeed ZeRO-3 shards the LM head, whose gradient a full-vocabulary penalty in the loss needs: put "
                "it into the reward, or use LoRA, ZeRO-2 or FSDP2"
            )
        for model in filter(None, (self.trainer.model, self.trainer.ref_model, self._ref_model)):
            backbone = self._causal_lm(model).base_model
            self._head(model)  # refuses a head that it cannot read now, not in the first batch
            if backbone not in self._hooked:
                self._hooked.append(backbone)
                backbone.register_forward_hook(self._keep_states)

    def need_reference_at_beta_zero(self) -> None:
        """Score with the reference even when `beta` is 0: free of memory with LoRA, else a second model is loaded."""
        trainer = self.trainer
        self.at_beta_zero = True
        if trainer.beta == 0 and trainer.ref_model is None and not self.has_free_reference:
            model = trainer.model
            kwargs = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
            self._ref_model = create_model_from_path(
                get_config_model_id(model.config), **(trainer.args.model_init_kwargs or {}) | kwargs
            )
            disable_dropout_in_model(self._ref_model)
            add_fused_lm_head(self._ref_model, temperature=trainer.temperature)
            self._ref_model = trainer.accelerator.prepare_model(self._ref_model, evaluation_mode=True)
            if self._hooked:
                self.need_hidden_states()

    def score(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs) -> Scored:
        self._states = [] if self._hooked else None
        logps, *others = self.get_logps(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        kept, self._states = self._states, None
        if kept is None:
            return Scored(logps, tuple(others), None, None)
        states = torch.cat([s[:, -logits_to_keep - 1 : -1] for s in kept])
        return Scored(logps, tuple(others), states, self._head(model))

    def score_reference(self, model, *asked, **kwargs) -> Scored:
        ref_model = self.trainer.ref_model if self._ref_model is None else self._ref_model
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
        """What both say of the last T tokens."""
        length = policy.logps.shape[1]
        hidden = policy.with_reference(reference.states, reference.head)
        ids, mask = input_ids[:, -length:], attention_mask[:, -length:]
        return kl.Rollout(policy.logps, reference.logps, ids, mask, hidden, base_logps=base_logps)

    def _head(self, model) -> kl.LMHead:
        """Of a head that ZeRO-3 shards a whole copy, without a gradient."""
        causal_lm = self._causal_lm(model)
        with maybe_gather_lm_head_ctx(*causal_lm.get_output_embeddings().parameters()):
            return kl.LMHead.of(causal_lm, self.trainer.temperature)

    def _causal_lm(self, model):
        model = self.trainer.accelerator.unwrap_model(model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _keep_states(self, module, args, output):
        if self._states is not None:
            self._states.append(output.last_hidden_state)
