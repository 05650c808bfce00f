"""Generations per second: the study's loop, stock TRL, and TRL with `use_fast_sampling`, in turns.

    python benchmarks/generation.py                         # the embedded model, batch 40
    python benchmarks/generation.py --model 33m --batch 10  # the shape of TinyStories-33M, random weights
    python benchmarks/generation.py --scaling               # cost of sampling alone as length, batch, vocabulary grow

100 new tokens, groups of 10, k1 in the reward, learning rate 0. Every repetition is a process of its own, so that peak
memory is a variant's own; one step is not counted. `--variants study stock "+ memory kept"` leaves the others out.
Prints Markdown: medians and the quartiles of paired ratios. The floor is the operations of the matrix products that no
implementation saves (decoding, two scoring passes, one of them with a backward pass), at the rate of a large product
on this machine with the same threads.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from common import TOKENS, device, in_a_process, make_trainer, model_folder, quiet, say
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from kl_alliteration import alliteration_reward, use_fast_sampling
from kl_alliteration.sampling import generate as generation
from kl_alliteration.sampling.decoder import read_decoder
from kl_alliteration.story_lm import PROMPT

VARIANTS = {  # and what each asks of `use_fast_sampling`
    "study": None,
    "stock": None,
    "fast sampling": {"one_forward": False, "keep_memory": False},
    "+ one forward": {"keep_memory": False},
    "+ memory kept": {},
}


def study_step(policy, reference, tokenizer, optimizer, group: int) -> None:
    """The study's update, written again: one text at a time, two models, SGD on advantage * mean cross-entropy."""
    texts, rewards = [], []
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for _ in range(group):
        ids = policy.generate(**prompt, do_sample=True, top_k=50, max_new_tokens=TOKENS)
        with torch.no_grad():
            ours, theirs = (model(ids, labels=ids).loss for model in (policy, reference))
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        rewards.append(alliteration_reward([PROMPT], [text])[0] - 0.4 * (theirs - ours).item())
        texts.append(ids)
    for i, ids in enumerate(texts):
        baseline = (sum(rewards) - rewards[i]) / (group - 1)
        ((rewards[i] - baseline) * policy(ids, labels=ids).loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def run_study(folder: str, batch: int, steps: int) -> dict:
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    policy.generation_config.update(eos_token_id=0, pad_token_id=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    group = min(batch, 10)
    study_step(policy, reference, tokenizer, optimizer, 2)
    start = time.perf_counter()
    for _ in range(steps):
        study_step(policy, reference, tokenizer, optimizer, group)
    seconds = (time.perf_counter() - start) / steps
    return {"step": seconds, "generations": group / seconds}


def run_trl(variant: str, folder: str, batch: int, steps: int) -> dict:
    options = {"beta": 0.25, "per_device_train_batch_size": batch, "max_steps": steps + 1}
    trainer = make_trainer(folder, **options)
    if VARIANTS[variant] is not None:
        use_fast_sampling(trainer, **VARIANTS[variant])
    spent = {name: [] for name in ("generate", "prepare", "step")}

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)
            return result

        return call

    trainer._generate = timed("generate", trainer._generate)
    trainer._prepare_inputs = timed("prepare", trainer._prepare_inputs)
    trainer.training_step = timed("step", trainer.training_step)
    trainer.train()
    generate, prepare, step = (statistics.median(values[1:]) for values in spent.values())
    return {
        "step": step,
        "generate": generate,
        "score": prepare - generate,
        "update": step - prepare,
        "generations": batch / step,
    }


def floor(folder: str, batch: int) -> float:
    """Seconds of the matrix products of one step at the rate of a 1024-cubed product."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    embeddings = {id(p) for n, p in model.named_parameters() if "embed" in n or "wte" in n or "wpe" in n}
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings)
    weights += model.get_output_embeddings().weight.numel()
    a = torch.randn(1024, 1024)
    seconds = min(timeit(lambda: a @ a) for _ in range(20))
    rate = 2 * 1024**3 / seconds
    return (
        2 * weights * batch * TOKENS * (1 + 1 + 3) / rate
    )  # decoded, reference, and the policy's pass and its backward


def timeit(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sampling_alone(way: str, vocabulary: int, batch: int, length: int) -> dict:
    """Median seconds of three, by a 0.3M-parameter Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocabulary, **sizes)).eval()
    ids = torch.randint(2, vocabulary, (batch, 4))
    mask = torch.ones_like(ids)
    config = GenerationConfig(do_sample=True, max_new_tokens=length, top_k=0, pad_token_id=1, disable_compile=True)
    model.generation_config.eos_token_id = None
    ways = {
        "transformers": lambda: model.generate(input_ids=ids, attention_mask=mask, generation_config=config),
        "ours": lambda: generation.sample(read_decoder(model), ids, mask, config),
    }
    return {"seconds": statistics.median(timeit(ways[way]) for _ in range(3))}


def scaling() -> None:
    """Sampling alone, ours and transformers': seconds and peak memory grow with what?"""
    print("| vocabulary | batch | new tokens | transformers (s) | ours (s) | ratio | transformers (MB) | ours (MB) |")
    print("|---" * 8 + "|")
    cases = [{"length": n} for n in (32, 128, 512)] + [{"batch": n} for n in (8, 40, 160, 640)]
    for case in cases + [{"vocabulary": n} for n in (512, 4608, 50_257)]:
        case = {"vocabulary": 4608, "batch": 40, "length": 100} | case
        theirs, ours = (
            in_a_process(__file__, "--way", way, "--case", json.dumps(case)) for way in ("transformers", "ours")
        )
        cells = " | ".join(str(value) for value in case.values())
        a, b = theirs["seconds"], ours["seconds"]
        memory = f"{theirs['memory']:.0f} | {ours['memory']:.0f}"
        print(f"| {cells} | {a:.2f} | {b:.2f} | {b / a:.2f} | {memory} |", flush=True)


def child(args) -> None:
    if args.way:
        found = sampling_alone(args.way, **json.loads(args.case))
    elif args.variant == "study":
        found = run_study(args.folder, args.batch, args.steps)
    else:
        found = run_trl(args.variant, args.folder, args.batch, args.steps)
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say(found)


def spread(values: list[float], digits: int) -> str:
    """Median and, where there are enough, quartiles."""
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) < 4:
        return median
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median} ({first:.{digits}f} - {third:.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "33m"), default="embedded")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for name in ("--variant", "--folder", "--way", "--case"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet()
    if args.variant or args.way:
        return child(args)
    if args.scaling:
        return scaling()
    folder = model_folder(args.model)
    runs = {variant: [] for variant in args.variants}
    options = ["--folder", folder, "--batch", str(args.batch), "--steps", str(args.steps)]
    for repeat in range(args.repeats):
        for variant in args.variants[:: -1 if repeat % 2 else 1]:
            runs[variant].append(in_a_process(__file__, "--variant", variant, *options))
    print(f"{args.model}, batch {args.batch}, {device()}; floor {floor(folder, args.batch):.2f} s a step\n")
    columns = ("generate", "score", "update", "step", "memory", "generations")
    print("| | generate (s) | score (s) | update (s) | step (s) | peak (MB) | generations/s |", end="")
    print(" generate / stock | step / stock | x study |")
    print("|---" * 10 + "|")
    for variant in args.variants:
        cells = []
        for name in columns:
            values = [r[name] for r in runs[variant] if name in r]
            cells.append(f"{statistics.median(values):.{0 if name == 'memory' else 2}f}" if values else "-")
        for other, part, digits in (("stock", "generate", 2), ("stock", "step", 2), ("study", "generations", 1)):
            pairs = zip(runs[variant], runs.get(other, []), strict=False)  # which may have been left out
            against = [mine[part] / theirs[part] for mine, theirs in pairs if part in mine and part in theirs]
            cells.append(spread(against, digits) if against else "-")
        print(f"| {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
