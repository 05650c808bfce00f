"""vLLM's server mode, against a stand-in on loopback that speaks what TRL's client speaks.

TRL's own `VLLMClient` talks to it over HTTP. What needs a GPU is replaced: where the client broadcasts weights by NCCL
to a server that waits for them in its request, they go through a queue here.
"""

import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM
from trl.generation import vllm_client, vllm_generation

from kl_alliteration import (
    KLMonitorCallback,
    KLPenalty,
    KLPenaltyCallback,
    kl,
    score_as_sampled,
    use_sampler_correction,
)
from kl_alliteration.sampling.generate import truncated


class Server(ThreadingHTTPServer):
    """A vLLM that has loaded the model of `folder`; `synced`: it takes the weights that it is sent."""

    daemon_threads = True

    def __init__(self, folder, logprobs_mode: str = "processed_logprobs", synced: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.logprobs_mode, self.synced = logprobs_mode, synced
        self.asked, self.sent = [], queue.Queue()  # (path, body) of all requests; lists of (name, tensor)

    @torch.no_grad()
    def complete(self, body: dict) -> list[dict]:
        """`n` choices a prompt, each token's log-probability after temperature and truncation, or before."""
        options = {"top_k": max(body["top_k"], 0), "top_p": body["top_p"], "min_p": body["min_p"]}
        choices = []
        for prompt in body["prompt"]:
            for _ in range(body["n"]):
                ids, said = list(prompt), []
                while len(said) < body["max_tokens"] and (not said or ids[-1] != 0):
                    logits = self.model(torch.tensor([ids])).logits[0, -1]
                    processed = truncated(logits[None] / body["temperature"], GenerationConfig(**options))[0]
                    token = torch.multinomial(processed.softmax(-1), 1).item()
                    shown = processed if self.logprobs_mode == "processed_logprobs" else logits
                    ids.append(token)
                    said.append(shown.log_softmax(-1)[token].item())
                names = [f"token_id:{token}" for token in ids[len(prompt) :]]
                top = [{name: logp} for name, logp in zip(names, said, strict=True)]
                logprobs = {"tokens": names, "token_logprobs": said, "top_logprobs": top}
                choices.append(
                    {
                        "prompt_token_ids": prompt,
                        "token_ids": ids[len(prompt) :],
                        "logprobs": None if body["logprobs"] is None else logprobs,
                    }
                )
        return choices

    def take_weights(self, info: dict) -> None:
        sent = self.sent.get(timeout=30)
        assert [name for name, _ in sent] == info["names"]
        assert [list(weights.shape) for _, weights in sent] == info["shapes"]
        if self.synced:
            self.model.load_state_dict(dict(sent))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        config = {
            "weight_transfer_config": {"backend": "nccl"},
            "model_config": {"logprobs_mode": self.server.logprobs_mode},
        }
        path = self.path.partition("?")[0]
        found = {
            "/health": {},
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/server_info": {"vllm_config": config},
            "/get_world_size": {"world_size": 1},
        }
        self.answer(found[path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        self.server.asked.append((self.path, body))
        if self.path == "/update_weights":
            self.server.take_weights(body["update_info"])
        self.answer({"choices": self.server.complete(body)} if self.path == "/v1/completions" else {"success": True})

    def answer(self, found: dict) -> None:
        text = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(tiny_model, monkeypatch):
    """`serve(**options)`: a running [`Server`], and a client whose weights reach it."""
    servers = []
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(vllm_client, "_HAS_RESET_PREFIX_CACHE_SUCCESS", True)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(
        vllm_client,
        "packed_nccl_broadcast_producer",
        lambda iterator, **kwargs: servers[-1].sent.put([(name, weights.clone()) for name, weights in iterator]),
        raising=False,
    )

    def start(**options) -> Server:
        servers.append(Server(tiny_model, **options))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def options_of(server: Server) -> dict:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("lora", [False, True])
def test_the_server_s_log_probabilities_are_heard_and_its_weights_are_the_trainer_s(make_trainer, serve, lora):
    server = serve()
    trainer = make_trainer(lora, learning_rate=0.05, **options_of(server))
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    use_sampler_correction(trainer)
    trainer.train()
    completions = [body for path, body in server.asked if path == "/v1/completions"]
    assert [body["logprobs"] for body in completions] == [0, 0, 0]
    assert [path for path, _ in server.asked].count("/finish_weight_update") == 3
    sampler = logged(trainer, "kl/sampler_k1_per_token")
    assert len(sampler) == 3 and all(abs(value) < 1e-5 for value in sampler)
    assert logged(trainer, "kl/sampler_weight") == pytest.approx([1.0] * 3, abs=1e-4)
    assert logged(trainer, "kl/exact_per_token")[-1] > 1e-3  # and the policy has moved


def test_weights_that_do_not_arrive_are_seen_in_the_step_after(make_trainer, serve):
    trainer = make_trainer(learning_rate=0.05, **options_of(serve(synced=False)))
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.train()
    sampler = logged(trainer, "kl/sampler_k3_per_token")
    assert abs(sampler[0]) < 1e-5 and sampler[1] > 1e-3


def test_truncation_and_temperature_on_a_server_are_scored_as_sampled(make_trainer, serve):
    trainer = make_trainer(top_k=5, temperature=0.7, **options_of(serve()))
    score_as_sampled(trainer)
    with pytest.warns(kl.KLWarning, match="^temperature=0.7"):
        trainer.add_callback(KLMonitorCallback(trainer))
    trainer.train()
    assert all(abs(value) < 1e-5 for value in logged(trainer, "kl/sampler_k1_per_token"))


def test_a_server_that_says_something_else_is_said(make_trainer, serve):
    """Before temperature and truncation: vLLM's default."""
    trainer = make_trainer(temperature=0.5, **options_of(serve(logprobs_mode="raw_logprobs")))
    with pytest.warns(kl.KLWarning) as said:
        trainer.add_callback(KLMonitorCallback(trainer))
    words = [str(each.message) for each in said if "logprobs-mode" in str(each.message)]
    assert len(words) == 1 and "raw_logprobs" in words[0] and "--logprobs-mode processed_logprobs" in words[0]
