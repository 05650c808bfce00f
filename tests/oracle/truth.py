"""What a run's numbers have to be: from `model(...).logits` and nothing else of this package.

Notation as in `kl_alliteration/kl.py`: log_p, log_q (B, T, V) of policy and reference, ids and mask (B, T).
"""

import inspect
from contextlib import nullcontext

import torch
from trl.trainer.utils import nanstd, use_adapter

from kl_alliteration._trl import seam_of

LEFT_TO_THE_MODEL = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "token_type_ids")
K = 8  # of the top-k estimate that is held against the truth


def log_probs(model, output, temperature: float, router: bool = False, **kwargs):
    """(B, T, V) log-probabilities of a batch's completions, at the positions that `generate` counts.

    Returns:
        With `router` the load-balancing loss too.
    """
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" in inspect.signature(type(inner).forward).parameters:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    kwargs |= {name: output[name] for name in LEFT_TO_THE_MODEL if output.get(name) is not None}
    if router:
        kwargs["output_router_logits"] = True
    found = model(input_ids=ids, attention_mask=mask, **kwargs)
    logits = found.logits[:, -output["completion_ids"].shape[1] - 1 : -1].float()
    log_p = (logits / temperature).log_softmax(-1)
    return (log_p, found.aux_loss) if router else log_p


def sampled(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (B, T)


def estimates(log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor, k: int = K) -> dict[str, torch.Tensor]:
    """Every estimator by name, (B, T) nats a token."""
    x = sampled(log_p, ids) - sampled(log_q, ids)
    values, places = log_p.topk(min(k, log_p.shape[-1]), -1)
    inside = (places == ids.unsqueeze(-1)).any(-1)
    head = (values.exp() * (values - log_q.gather(-1, places))).sum(-1)
    return {
        "k1": x,
        "k2": x * x / 2,
        "k3": (-x).exp() - 1 + x,
        "abs": x.abs(),
        "exact": (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward": (log_q.exp() * (log_q - log_p)).sum(-1),
        "top_k": torch.where(inside, head, head + x),
    }


def penalty_of(penalty, log_p: torch.Tensor, log_q: torch.Tensor, ids, mask) -> torch.Tensor:
    """(B,), what beta is multiplied with."""
    name = "forward" if penalty.direction == "forward" else penalty.estimator
    lengths = mask.sum(-1)
    total = (estimates(log_p, log_q, ids, penalty.top_k)[name] * mask).sum(-1)
    if penalty.reduction == "mean":
        total = total / lengths.clamp(min=1)
    if penalty.budget_per_token is not None:
        free = penalty.budget_per_token * (lengths if penalty.reduction == "sum" else 1)
        total = (total - free).clamp(min=0)
    return total


class Oracle:
    """Recomputes every generation batch and every loss of a trainer, and keeps the largest difference of each kind.

    Made when the trainer has all its callbacks. `penalty`: the [`~kl_alliteration.KLPenalty`], or `None` for GRPO,
    whose own numbers are not looked at.
    """

    def __init__(self, trainer, penalty=None):
        self.trainer, self.penalty, self.worst, self.counts = trainer, penalty, {}, {"batches": 0, "losses": 0}
        self.rollouts, self.rewards, self.log_q = [], [], {}
        self.exact_per_token = 0.0
        seam_of(trainer).observers.append(self.rollouts.append)
        self.stock = trainer._generate_and_score_completions, trainer._compute_loss, trainer._calculate_rewards
        trainer._generate_and_score_completions = self.generate
        if penalty is not None:
            trainer._compute_loss, trainer._calculate_rewards = self.compute_loss, self.calculate_rewards

    def differ(self, name: str, found, truth, mask=None) -> None:
        """Largest difference, of numbers beyond 1 in relation to them."""
        found, truth = (torch.as_tensor(x, dtype=torch.float64) for x in (found, truth))
        off = (found - truth).abs() / truth.abs().clamp(min=1)
        off = torch.where(mask.bool(), off, 0.0) if mask is not None else off
        self.worst[name] = max(self.worst.get(name, 0.0), off.max().nan_to_num(nan=torch.inf).item())

    @torch.no_grad()
    def of_reference(self, output) -> torch.Tensor:
        trainer, loaded = self.trainer, seam_of(self.trainer).scorer.own_reference
        model = trainer.model if loaded is None and trainer.ref_model is None else loaded or trainer.ref_model
        adapters = getattr(model, "peft_config", {})
        off = use_adapter(model, "ref" if "ref" in adapters else None) if model is trainer.model else nullcontext()
        with off, trainer.accelerator.autocast():
            return log_probs(model, output, trainer.temperature)

    def calculate_rewards(self, *args, **kwargs):
        self.rewards.append(self.stock[2](*args, **kwargs))
        return self.rewards[-1]

    def generate(self, inputs):
        output, trainer = self.stock[0](inputs), self.trainer
        self.counts["batches"] += 1
        ids, mask = output["completion_ids"], output["completion_mask"]
        with torch.no_grad(), trainer.accelerator.autocast():
            log_p = log_probs(trainer.model, output, trainer.temperature)
        log_q = self.of_reference(output)
        self.log_q |= {tuple(row.tolist()): q for row, q in zip(self.texts(output), log_q, strict=True)}
        rollout, truth = self.rollouts[-1], estimates(log_p, log_q, ids)
        self.differ("logps", rollout.logps, sampled(log_p, ids), mask)
        self.differ("ref_logps", rollout.ref_logps, sampled(log_q, ids), mask)
        for name in ("k1", "k2", "k3", "exact"):
            self.differ(name, rollout.per_token_kl(name), truth[name], mask)
        self.differ("top_k", rollout.per_token_kl("top_k", k=K), truth["top_k"], mask)
        self.differ("forward", rollout.per_token_kl("exact", "forward"), truth["forward"], mask)
        counted = mask.sum().clamp(min=1)
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        for name in ("k1", "k3", "exact"):
            logged = metrics[f"kl/{name}_per_token"][-1]
            self.differ("logged", logged, (truth[name] * mask).sum() / counted)
        self.exact_per_token = max(self.exact_per_token, ((truth["exact"] * mask).sum() / counted).item())
        if self.penalty is not None:
            if trainer.beta != 0 and metrics["kl"]:  # which GRPO logs with its loss
                self.differ("logged", metrics["kl"][-1], (truth["k1"] * mask).sum() / counted)
            self.differ("advantages", output["advantages"], self.advantages(output, log_p, log_q, ids, mask))
        return output

    def texts(self, output) -> torch.Tensor:
        return torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)

    def asked(self, output) -> tuple:
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        return self.texts(output), mask, output["completion_ids"].shape[1]

    def advantages(self, output, log_p, log_q, ids, mask) -> torch.Tensor:
        trainer, rewards = self.trainer, self.rewards[-1]
        total = (rewards * trainer.reward_weights).nansum(1)
        if trainer.reward_clip_range:
            total = total.clamp(*trainer.reward_clip_range)
        total = total.masked_fill(rewards.isnan().all(1), torch.nan)
        if self.penalty.in_reward:
            total = total - trainer.beta * penalty_of(self.penalty, log_p, log_q, ids, mask)
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        groups = total.view(-1, size)
        if size == 1:
            return torch.zeros_like(total)
        others = (groups.nansum(1, keepdim=True) - groups) / (size - 1)
        found = (groups - others).view(-1)
        if trainer.normalize_advantages:
            found = (found - found.nanmean()) / (nanstd(found) + 1e-4)
        return found.nan_to_num(nan=0.0)

    def compute_loss(self, model, inputs):
        loss, trainer = self.stock[1](model, inputs), self.trainer
        self.counts["losses"] += 1
        ids, mask, log_q = inputs["completion_ids"], inputs["completion_mask"], []
        for row in self.texts(inputs):
            log_q.append(self.log_q[tuple(row.tolist())])
        log_q, router = torch.stack(log_q), trainer.aux_loss_enabled
        with trainer.accelerator.autocast():
            found = log_probs(model, inputs, trainer.temperature, router)
        log_p, aux = found if router else (found, 0.0)
        logps = sampled(log_p, ids)
        if seam_of(trainer).scorer.own_head:  # TRL trains by other numbers than the model's, and the package says so
            logps = seam_of(trainer).scorer.get_logps(model, *self.asked(inputs))[0]
        ratio = ((logps * mask).sum(1) - inputs["old_logps"]).exp()
        clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
        truth = -torch.min(ratio * inputs["advantages"], clipped * inputs["advantages"]).mean()
        if self.penalty.in_loss and trainer.beta != 0:
            penalty = penalty_of(self.penalty, log_p, log_q, ids, mask)
            truth = truth + trainer.beta * (clipped.detach() * penalty).mean()
        if router:
            truth = truth + trainer.router_aux_loss_coef * aux
        self.differ("loss", loss.detach(), truth.detach())
        if loss.requires_grad:
            self.compare_gradients(model, loss, truth)
        return loss

    def compare_gradients(self, model, loss, truth) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = []
        for value, keep in ((loss, True), (truth, False)):
            found = torch.autograd.grad(value, parameters, retain_graph=keep, allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
            flat.append(torch.cat([g.flatten().float() for g in whole]))
        off = (flat[0] - flat[1]).norm() / flat[1].norm().clamp(min=1e-6)
        self.worst["gradient"] = max(self.worst.get("gradient", 0.0), off.nan_to_num(nan=torch.inf).item())


class GRPOOracle(Oracle):
    """The same of a stock `GRPOTrainer` whose penalty is another than its own."""

    def __init__(self, trainer, penalty):
        super().__init__(trainer, penalty)
        self.scales = {}  # of a completion, what its group's spread divides the penalty in the loss by

    def advantages(self, output, log_p, log_q, ids, mask) -> torch.Tensor:
        trainer = self.trainer
        rewards = self.rewards[-1][:, : len(trainer.reward_funcs)]
        total = (rewards * trainer.reward_weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
        if self.penalty.in_reward:
            total = total - trainer.beta * penalty_of(self.penalty, log_p, log_q, ids, mask)
        groups = total.view(-1, trainer.num_generations)
        found = groups - groups.nanmean(1, keepdim=True)
        spread = nanstd(groups, dim=1)[:, None].expand_as(groups) if trainer.scale_rewards == "group" else None
        spread = nanstd(total).expand_as(groups) if trainer.scale_rewards == "batch" else spread
        divisor = torch.ones_like(groups) if spread is None else spread + 1e-4
        self.scales |= {
            tuple(row.tolist()): each for row, each in zip(self.texts(output), divisor.flatten().tolist(), strict=True)
        }
        return (found / divisor).flatten().nan_to_num(nan=0.0)

    def reduced(self, per_token, mask, inputs) -> torch.Tensor:
        """TRL's mean of (B, T) values, by its `loss_type`."""
        trainer, total = self.trainer, (per_token * mask).sum(-1)
        steps, kind = trainer.current_gradient_accumulation_steps, trainer.loss_type
        if kind == "grpo":
            return (total / mask.sum(-1).clamp(min=1)).mean() / steps
        if kind == "bnpo":
            return total.sum() / mask.sum().clamp(min=1) / steps
        if kind == "dr_grpo":
            return total.mean() / trainer.max_completion_length / steps
        if kind == "luspo":
            return total.mean() / steps
        return total.sum() / inputs["num_items_in_batch"].clamp(min=1) / steps * trainer.args.steps_per_generation

    def compute_loss(self, model, inputs):
        loss, trainer = self.stock[1](model, inputs), self.trainer
        self.counts["losses"] += 1
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        rows = [tuple(row.tolist()) for row in self.texts(inputs)]
        log_q, advantages = torch.stack([self.log_q[row] for row in rows]), inputs["advantages"][:, None]
        log_p = log_probs(model, inputs, trainer.temperature)
        logps = sampled(log_p, ids)
        log_ratio = logps - inputs.get("old_per_token_logps", logps.detach())
        if trainer.importance_sampling_level == "sequence":
            log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None].expand_as(logps)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
        truth = self.reduced(-torch.min(ratio * advantages, clipped * advantages), mask, inputs)
        if self.penalty.in_loss:
            penalty = penalty_of(self.penalty, log_p, log_q, ids, mask)
            if "old_per_token_logps" in inputs:  # weighted from the policy that sampled to the present one
                whole = ((logps.detach() - inputs["old_per_token_logps"]) * mask).sum(1).exp()
                penalty = whole.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high) * penalty
            if self.penalty.in_reward:
                penalty = penalty / torch.tensor([self.scales[row] for row in rows])
            spread_out = penalty[:, None] / mask.sum(-1, keepdim=True).clamp(min=1)  # the same on each of its tokens
            truth = truth + trainer.beta * self.reduced(spread_out.expand_as(logps), mask, inputs)
        self.differ("loss", loss.detach(), truth.detach())
        x = (sampled(log_p, ids) - sampled(log_q, ids)).detach()
        weights = ratio.detach() if trainer.args.use_bias_correction_kl else 1.0
        k3 = (((-x).exp() - 1 + x) * weights * mask).sum() / mask.sum().clamp(min=1)
        self.differ("logged", trainer._metrics["train"]["kl"][-1], k3)
        if loss.requires_grad:
            self.compare_gradients(model, loss, truth)
        return loss
