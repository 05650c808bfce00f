"""The one door to TRL's private names. Read from trl 1.16.0, `rloo_trainer.py` and `grpo_trainer.py`.

What is leaned on, each guarded by `tests/test_trl_seam.py`, or `tests/test_grpo.py` for GRPO:

- `_generate_and_score_completions(inputs)` makes one generation batch. Inside it `_get_per_token_logps_and_entropies`
  is called for the policy and then, if `beta != 0`, for the reference; nothing else calls it there. Its first result
  is `logps` (B, T); its second to fourth positional arguments are `input_ids` and `attention_mask` (B, P + T) and
  `logits_to_keep`, T. With LoRA the second call runs while the adapter is off.
- the penalty is `beta * ((logps - ref_logps) * completion_mask).sum(-1)`, subtracted from the reward.
- what it returns is a dictionary whose tensors, (B, ...), are shuffled and split together; `old_logps` is (B,).
- `_compute_loss(model, inputs)` calls `_get_per_token_logps_and_entropies` once, and means its loss over B.
- both calls end in the backbone, `base_model` of the causal language model, once a chunk of B, with the positions of
  prompt and completion; its `last_hidden_state` is what the LM head is applied to.
- that call is `model(input_ids=, attention_mask=, labels=, fused_lm_head=True)` of a chunk of B, -100 among the labels
  where no log-probability is asked for; with `shift_labels` in their place the head takes the backbone's states as
  they are. `shared_prompts.py` leans on it, guarded by `tests/test_shared_prompts.py`.
- `_metrics[mode]["kl"]` holds one mean log-ratio per generation batch, averaged at the next log.
- `_step` counts micro-batches and `_buffered_inputs` holds those of the generation batch under way.
- `_logs` holds the last generation batch, of all processes in their order: `prompt`, `completion`, `rewards` by name,
  `advantages`; the returned `advantages` are this process's slice.
- of `GRPOTrainer`, which has the same names: what `_generate_and_score_completions` returns holds `prompt_ids`,
  `prompt_mask`, `completion_ids`, `completion_mask`, (B, P) and (B, T), and its loss reads `beta` anew.
- and for a penalty there, guarded by `tests/test_grpo_penalty.py`: `_generate(prompts)[2]` holds masks of tools'
  tokens; scores are asked for by keyword `batch_size`, the policy's only where the batch serves more than one update,
  the reference's after it and before `_calculate_rewards`, whose columns are summed by `reward_weights` as it then is;
  `scale_rewards` divides by `nanstd` + 1e-4; the loss at beta 0 leaves its KL out, and divides by `loss_type`;
  its advantages may be (B, T), which `tests/test_reward_to_go.py` guards.
- `_load_from_checkpoint(checkpoint)`, of transformers, brings model or adapters back, `_load_best_model()` the best.
- `_tokenize_prompts(prompts)[0]`, `_calculate_rewards(inputs, prompts, completions, completion_ids)`, which gives
  (B of all processes, functions), `_pending_metrics`, `_pending_extra_logs`, and `trl.data_utils._tokenize` are what
  `asking.py` uses, and `prefixes.py` of prefixes, decoded with `skip_special_tokens` as in `_generate`;
  where the methods `_log_metric` and `_log_completion_extra`, which TRL hands to rewards, are hidden, and of
  `reward_funcs`, `reward_func_names` and `reward_processing_classes` only some are left;
  `tests/test_judge_is_trainer.py` and `tests/test_reward_to_go.py` guard them; and
  `trl.models.unwrap_model_for_generation`, which gathers what ZeRO-3 shards: `tests/engines/test_deepspeed.py`.
- `vllm_generation.logprobs`, `None` in RLOO, and `vllm_generation.generate(...)`, whose third result are lists
  (B, T, 1) of log-probabilities where that is 0; `tests/test_sampler_correction.py` guards them; in server mode
  `vllm_generation.vllm_client.get_server_info()`, guarded by `tests/test_vllm_server.py`.
- `use_adapter` and `create_model_from_path`, `add_fused_lm_head`, `disable_dropout_in_model`, `prepare_deepspeed`,
  `prepare_fsdp`, by which it makes the reference, and `is_deepspeed_enabled`, `is_fsdp_enabled`, by which it chooses.
"""

from trl import GRPOTrainer

from .asking import end_training
from .baseline import last_reward_std, last_rewards, leave_baseline_out, spreads_in_groups
from .engine import listen_to_engine
from .grpo import GRPOSeam
from .prefixes import partial_rewards, rewards_of_nothing, scores_prefixes
from .proof import drops, rotary_by_length
from .reference import why_off_is_not_the_base
from .rloo import RLOOSeam
from .seam import Seam, UnknownTRLError, forget_batches, last_completions

__all__ = [
    "Seam",
    "UnknownTRLError",
    "drops",
    "end_training",
    "forget_batches",
    "last_completions",
    "last_reward_std",
    "last_rewards",
    "leave_baseline_out",
    "listen_to_engine",
    "partial_rewards",
    "rewards_of_nothing",
    "rotary_by_length",
    "scores_prefixes",
    "seam_of",
    "spreads_in_groups",
    "why_off_is_not_the_base",
]


def seam_of(trainer) -> Seam:
    """The trainer's one seam, installed at the first call."""
    if "_kl_alliteration_seam" not in vars(trainer):
        kind = GRPOSeam if isinstance(trainer, GRPOTrainer) else RLOOSeam
        trainer._kl_alliteration_seam = kind(trainer)
    return trainer._kl_alliteration_seam
