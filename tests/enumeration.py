"""All completions of a 2-step, 5-token model in float64: what expectations are taken over without sampling."""

import itertools

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

V, STEPS = 5, 2
PROMPT = [3, 4]  # "b c"
FIXED = [list(ids) for ids in itertools.product(range(V), repeat=STEPS)]
ENDING = [[0], *(ids for ids in FIXED if ids[0] != 0)]  # token 0 ends a completion


class Float64Head:
    """TRL's fused head computes in float32; this stands in for it and says the same in float64."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
        logps = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return logps, entropy, None, logits.mean(-1).detach(), logits.argmax(-1) == targets


def save_model(folder) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level(), eos_token="e", pad_token="p", padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    transformers.set_seed(0)
    sizes = {"vocab_size": V, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    special = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
    config = transformers.GPT2Config(**sizes, **special, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    model.save_pretrained(folder)


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate("epabc")}, unk_token="p"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def move(trainer, seed: int = 1, far: float = 0.3) -> None:
    """Take the policy away from its reference, or from where it is, by a fixed step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(trainer):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * far)


def parameters(trainer) -> list[torch.Tensor]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


class Tables:
    """Next-token log-probabilities of policy (with gradient) and reference: first (V,), second (V, V)."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.p1, self.p2 = self._of(trainer.model)
        with torch.no_grad():
            if trainer.ref_model is not None:
                self.q1, self.q2 = self._of(trainer.ref_model)
            else:
                with trainer.model.disable_adapter():
                    self.q1, self.q2 = self._of(trainer.model)

    def _of(self, model):
        first = torch.tensor([PROMPT])
        second = torch.tensor([[*PROMPT, v] for v in range(V)])
        logits = [model(ids).logits[:, -1].log_softmax(-1) for ids in (first, second)]
        return logits[0][0], logits[1]

    def states(self):
        """(how likely the state is, log p, log q) of all 1 + V states; the first is certain."""
        yield torch.ones((), dtype=torch.float64), self.p1, self.q1
        for v in range(V):
            yield self.p1[v].exp(), self.p2[v], self.q2[v]

    def gradient(self, objective: torch.Tensor) -> torch.Tensor:
        ps = parameters(self.trainer)
        found = torch.autograd.grad(objective, ps, allow_unused=True)
        return flat([torch.zeros_like(p) if g is None else g for g, p in zip(found, ps, strict=True)])


def reverse_kl(t: Tables):
    """KL(policy || reference) of whole completions, summed over the 25 of them."""
    log_p, log_q = t.p1[:, None] + t.p2, t.q1[:, None] + t.q2
    return (log_p.exp() * (log_p - log_q)).sum()


def per_state(t: Tables, f):
    """sum over states of f(log p, log q), states held fixed: a partial objective."""
    return sum(w.detach() * f(p, q) for w, p, q in t.states())


def kl_reverse(p, q):
    return (p.exp() * (p - q)).sum()


def kl_forward(p, q):
    return (q.exp() * (q - p)).sum()
