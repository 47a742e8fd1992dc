"""A random Llama with 64 adapters on disk, and vLLM's HTTP server over them. `make test-vllm` runs these tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_ADAPTERS, RANK, VOCABULARY = 64, 16, 2000
START_SECONDS = 240  # on a busy machine; 25 on a quiet one
TIE = 1e-4  # of log probabilities: sums of another batch's shape differ by 1e-5 at most here


class Answer(NamedTuple):
    """What the server said.

    Attributes:
        tokens: the new tokens.
        logprobs: their log probabilities.
        runners_up: those of the second best tokens.
    """

    tokens: list[int]
    logprobs: list[float]
    runners_up: list[float]

    def assert_same(self, right: Answer, what: str) -> None:
        """The same tokens and log probabilities. Where two tokens are as likely as each other, either may come."""
        for position, (token, expected) in enumerate(zip(self.tokens, right.tokens, strict=True)):
            where = f"{what}, token {position}"
            assert abs(self.logprobs[position] - right.logprobs[position]) < TIE, where
            if token != expected:
                assert right.logprobs[position] - right.runners_up[position] < TIE, where
                return  # what follows has another prompt

    def assert_fits(self, logits: torch.Tensor, what: str) -> None:
        """The tokens are the best of the logits `[num_tokens, vocabulary]`, with their log probabilities."""
        logprobs = logits.log_softmax(-1)
        own = logprobs[range(len(self.tokens)), self.tokens]
        assert (own - torch.tensor(self.logprobs)).abs().max() < TIE, what
        assert (logprobs.max(-1).values - own).max() < TIE, what


class Refused(Exception):
    """The server refused one request."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Server:
    """vLLM's own server in a process of its own, and requests to it."""

    Refused = Refused

    def __init__(self, model: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model = str(model)
        self.log = folder / "server.log"
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        environment.pop("OMP_NUM_THREADS", None)  # the engine chooses
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--enable-lora"]
        command += ["--max-loras", str(NUM_ADAPTERS), "--max-lora-rank", str(RANK), "--max-num-seqs", "96"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-5000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> str:
        import requests

        return str(self._checked(requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=120)))

    def post(self, path: str, body: dict[str, Any]) -> str:
        import requests

        return self._checked(requests.post(f"http://127.0.0.1:{self.port}{path}", json=body, timeout=120))

    @staticmethod
    def _checked(response: Any) -> str:
        if not response.ok:
            raise Refused(response.status_code, response.text)
        return str(response.text)

    def load(self, name: str, folder: Path, in_place: bool = False) -> None:
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "load_inplace": in_place})

    def unload(self, name: str) -> None:
        self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def loaded(self) -> set[str]:
        return {each["id"] for each in json.loads(self.get("/v1/models"))["data"]} - {self.model}

    def running(self) -> int:
        """Requests in the engine's batch."""
        lines = self.get("/metrics").splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{")))

    def complete(self, adapter: str | None, prompt: list[int], max_tokens: int = 12) -> Answer:
        """The greedy answer of an adapter; None for the base model."""
        body = {
            "model": self.model if adapter is None else adapter,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_token_ids": True,
        }
        choice = json.loads(self.post("/v1/completions", body))["choices"][0]
        top = [sorted(each.values(), reverse=True) for each in choice["logprobs"]["top_logprobs"]]
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], [each[1] for each in top])


class World(NamedTuple):
    """What is on disk: the model, and 64 adapters, each made of a seed, which is its place here."""

    model: Path
    adapters: list[Path]

    @staticmethod
    def prompt(seed: int | None) -> list[int]:
        """16 tokens of an adapter's own; None for the base model's."""
        generator = torch.Generator().manual_seed(NUM_ADAPTERS if seed is None else seed)
        return torch.randint(10, VOCABULARY, (16,), generator=generator).tolist()


def make_model(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, **sizes)).eval()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2", "pad_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return model


def write_adapter(folder: Path, model: Any, seed: int, rank: int = RANK) -> Path:
    """An adapter on the seven dense layers of each block, as far from zero as the model's own weights."""
    from safetensors.torch import save_file

    from pylora import LoraConfig

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            stem = f"base_model.model.{name}"
            a = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            tensors[f"{stem}.lora_A.weight"] = a
            tensors[f"{stem}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.05
    folder.mkdir(parents=True)
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base") / "model"


@pytest.fixture(scope="session")
def base_model(model_folder: Path) -> Any:
    """The base model in this process, without vLLM; it is in `model_folder` as well."""
    return make_model(model_folder)


@pytest.fixture(scope="session")
def world(base_model: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("adapters")
    return World(model_folder, [write_adapter(folder / str(i), base_model, i) for i in range(NUM_ADAPTERS)])


@pytest.fixture
def make_adapter(base_model: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes one more adapter: `make_adapter(name, seed, rank=16)`."""

    def make(name: str, seed: int, rank: int = RANK) -> Path:
        return write_adapter(tmp_path / name, base_model, seed, rank)

    return make


@pytest.fixture(scope="session")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(world.model, tmp_path_factory.mktemp("server"))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def loaded(server: Server, world: World) -> dict[str, int]:
    """All 64 adapters on the server and nothing else: their seeds by name."""
    names = {f"a{i}": i for i in range(NUM_ADAPTERS)}
    for extra in server.loaded() - set(names):
        server.unload(extra)
    for name in set(names) - server.loaded():
        server.load(name, world.adapters[names[name]])
    return names


@pytest.fixture(scope="session")
def alone(server: Server, world: World) -> Callable[[int | None], Answer]:
    """What the adapter of a seed (None: the base model) answers to its prompt with nothing beside it.

    Ask before there is anything beside it; later calls only remember.
    """
    known: dict[int | None, Answer] = {}

    def ask(seed: int | None) -> Answer:
        if seed not in known:
            assert server.running() == 0
            known[seed] = server.complete(None if seed is None else f"a{seed}", world.prompt(seed))
        return known[seed]

    return ask
