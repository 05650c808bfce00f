"""What an engine that samples says of its tokens, where TRL does not ask it: RLOO's vLLM."""

import warnings

import torch

from .. import kl


def listen_to_engine(seam) -> None:
    """Have the trainer's vLLM, where it has one, say how likely each sampled token was.

    GRPO asks it itself. The log-probabilities are those after temperature and truncation; a server that gives others
    is said.
    """
    engine = getattr(seam.trainer, "vllm_generation", None)
    if engine is None or engine.logprobs is not None:
        return
    client = getattr(engine, "vllm_client", None)  # of the main process, where the engine is a server
    if client is not None:
        mode = client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            warnings.warn(
                f"the vLLM server runs with --logprobs-mode {mode}: what it says of its tokens is not what it samples "
                "by, and kl/sampler_... and the correction are wrong. Restart it with "
                "--logprobs-mode processed_logprobs",
                kl.KLWarning,
                stacklevel=4,
            )
    engine.logprobs, stock = 0, engine.generate  # 0: of the sampled token and no other

    def generate(*args, **kwargs):
        prompt_ids, completion_ids, logprobs, token_ids = stock(*args, **kwargs)
        device = seam.trainer.accelerator.device
        rows = [torch.tensor([torch.nan if p[0] is None else p[0] for p in row], device=device) for row in logprobs]
        seam.keep_sampled(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))  # (B, T)
        return prompt_ids, completion_ids, logprobs, token_ids

    engine.generate = generate
