"""The embedded story model: a small pretrained Llama, its corpus and the command that makes it again."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"  # a transformers folder, for `from_pretrained`
PROMPT = "Once upon a time"
