"""The embedded story model: its weights, as a folder of transformers' own format, and what its stories start with."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"  # a transformers folder, for `from_pretrained`
PROMPT = "Once upon a time"
