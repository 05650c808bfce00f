"""Teach a story model to alliterate with TRL's RLOO and a KL penalty.

    accelerate launch recipes/rloo_tall_tree.py                # the embedded model: many plots, within a budget of KL
    accelerate launch recipes/rloo_tall_tree.py --use_peft     # a LoRA adapter; the reference is the base
    accelerate launch recipes/rloo_tall_tree.py --config recipes/fixed_beta.yaml --beta 0   # the collapse

Every option of TRL's `RLOOConfig` and `ModelConfig` works here; `rloo_tall_tree.yaml` holds the defaults, `--config`
takes another file. Into the output directory go the model or adapter, `curves.png`, `metrics.jsonl`, `stories.md` and
`summary.json`.
"""

from trl import RLOOConfig, RLOOTrainer

from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.run import train_online

if __name__ == "__main__":
    train_online(RLOOTrainer, OnlineArguments, RLOOConfig, __file__)
