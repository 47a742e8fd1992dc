"""vLLM's HTTP server with pylora's plugin: every row of a batch is as its adapter gives it alone."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here; `make test-vllm` has it", allow_module_level=True)

Alone = Callable[[int | None], Any]


@pytest.mark.parametrize(("switch", "wrapper"), [("1", "PyloraPunicaWrapper"), ("0", "PunicaWrapperCPU")])
def test_vllm_takes_pyloras_products(tmp_path: Path, switch: str, wrapper: str) -> None:
    code = (
        "from vllm.plugins import load_general_plugins as load; load(); "
        "from vllm.platforms import current_platform as platform; print('->', platform.get_punica_wrapper())"
    )
    environment = {**os.environ, "PYLORA_VLLM": switch}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f".{wrapper}")


def test_an_adapter_alone_gives_what_pylora_computes_without_vllm(
    loaded: dict[str, int], world: Any, base_model: Any, alone: Alone
) -> None:
    """The other tests' reference, against a PeftModel: each answer is forced through it in one forward."""
    from pylora import PeftModel

    for seed in (None, *loaded.values()):
        answer, prompt = alone(seed), world.prompt(seed)
        ids = torch.tensor([prompt + answer.tokens])
        with torch.inference_mode():
            base = base_model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            if seed is None:
                answer.assert_fits(base, "the base model")
                continue
            model = PeftModel.from_pretrained(base_model, world.adapters[seed]).eval()
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            model.unload()
        answer.assert_fits(logits, f"adapter {seed}")
        assert (logits - base).abs().max() > 0.1  # so that another adapter's row would be seen


def test_64_adapters_and_the_base_model_in_one_batch(
    server: Any, loaded: dict[str, int], world: Any, alone: Alone
) -> None:
    """A burst of a request for each adapter and 16 for the base model, three times in other orders."""
    seeds = [*loaded.values(), *[None] * 16]
    right = {seed: alone(seed) for seed in seeds}
    most = 0
    for turn in range(3):
        random.Random(turn).shuffle(seeds)
        with ThreadPoolExecutor(len(seeds)) as pool:
            futures = [
                pool.submit(server.complete, None if seed is None else f"a{seed}", world.prompt(seed)) for seed in seeds
            ]
            while not all(future.done() for future in futures):
                most = max(most, server.running())
        for seed, future in zip(seeds, futures, strict=True):
            future.result().assert_same(right[seed], "the base model" if seed is None else f"adapter {seed}")
            if seed is None:
                assert future.result().tokens == right[None].tokens
    assert most > 16  # they did share batches


class Load:
    """Threads that ask for adapters and the base model, and check every answer, until the block ends.

    Attributes:
        served: answers that were right.
        refused: names that the server did not know when a request for them came.
    """

    def __init__(
        self, server: Any, world: Any, right: dict[int | None, Any], names: Callable[[], dict[str, int]]
    ) -> None:
        self.served, self.refused = 0, []
        self._server, self._world, self._right, self._names = server, world, right, names
        self._errors: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(6)]

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._over.is_set() and not self._errors:
            try:
                self._ask(*rng.choice([("", None), *self._names().items()]))
            except BaseException as error:
                self._errors.append(error)

    def _ask(self, name: str, seed: int | None) -> None:
        try:
            answer = self._server.complete(name or None, self._world.prompt(seed))
        except self._server.Refused as refusal:
            if refusal.status != 404 or name not in refusal.message:
                raise
            self.refused.append(name)
            return
        answer.assert_same(self._right[seed], name or "the base model")
        self.served += 1

    def wait_for(self, answers: int) -> None:
        """Wait until so many more answers have come."""
        until, end = self.served + answers, time.monotonic() + 60
        while self.served < until and not self._errors:
            assert time.monotonic() < end, "no answers"
            time.sleep(0.01)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
        if self._errors:
            raise self._errors[0]


def test_adapters_come_and_go_while_requests_run(server: Any, loaded: dict[str, int], world: Any, alone: Alone) -> None:
    """Names are unloaded while requests for them run, and loaded again: as themselves, or with another's files.

    The engine's 64 slots are written again and again meanwhile, by other adapters than they had.
    """
    right = {seed: alone(seed) for seed in (None, *loaded.values())}
    known = dict(loaded)
    rng = random.Random(0)
    with Load(server, world, right, lambda: dict(known)) as load:
        load.wait_for(10)
        for turn in range(40):
            name = rng.choice([*known])
            server.unload(name)
            load.wait_for(1)  # of others, or of requests for this one that were under way
            del known[name]
            seed = rng.randrange(64)
            new = f"b{turn}"
            server.load(new, world.adapters[seed])
            known[new] = seed
            load.wait_for(2)
    assert load.served > 120
    assert set(load.refused) <= {*loaded, *(f"b{turn}" for turn in range(40))} - set(known)
    assert server.loaded() == set(known)


def test_a_name_gets_other_files_in_place(
    server: Any, loaded: dict[str, int], world: Any, alone: Alone, make_adapter: Callable[..., Path]
) -> None:
    """Of rank 16, then 4, then 16 again: what the slot held before must be gone."""
    right = {seed: alone(seed) for seed in (None, *loaded.values())}
    small = make_adapter("small", 1000, 4)
    prompt = world.prompt(7)
    server.load("own", small)
    own = server.complete("own", prompt)
    server.unload("own")
    with Load(server, world, right, lambda: {name: seed for name, seed in loaded.items() if name != "a7"}) as load:
        for folder, expected in (
            (small, own),
            (world.adapters[7], right[7]),
            (small, own),
            (world.adapters[7], right[7]),
        ):
            server.load("a7", folder, in_place=True)
            load.wait_for(3)
            server.complete("a7", prompt).assert_same(expected, str(folder))
    assert own.tokens != right[7].tokens
    server.unload("a7")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(dict(change(key, tensor) for key, tensor in load_file(path).items()), path, metadata={"format": "pt"})


BAD = {
    "no folder": (lambda f: shutil.rmtree(f), "No adapter found"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "No adapter found"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ""),
    "configuration that is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), ""),
    "truncated weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-99]),
        "",
    ),
    "rank above the server's": (lambda f: edit_config(f, r=32), "rank"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "DoRA"),
    "layers the model lacks": (lambda f: edit_weights(f, lambda k, t: (k.replace("q_proj", "z_proj"), t)), "z_proj"),
    "factors of a wider model": (
        lambda f: edit_weights(f, lambda k, t: (k, torch.cat((t, t), 1) if "lora_A" in k else t)),
        "",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_and_others_go_on(
    kind: str, server: Any, loaded: dict[str, int], world: Any, alone: Alone, make_adapter: Callable[..., Path]
) -> None:
    right = {seed: alone(seed) for seed in (None, *loaded.values())}
    folder = make_adapter("bad", 2000)
    damage, message = BAD[kind]
    damage(folder)
    with Load(server, world, right, lambda: loaded) as load:
        load.wait_for(3)
        with pytest.raises(server.Refused) as refusal:
            server.load("bad", folder)
        assert 400 <= refusal.value.status <= 500
        assert message in refusal.value.message
        with pytest.raises(server.Refused, match=r"404.*bad"):
            server.complete("bad", world.prompt(0))
        load.wait_for(6)
    assert load.refused == []
    assert server.loaded() == set(loaded)


def test_an_unknown_adapter_is_refused_alone(server: Any, loaded: dict[str, int], world: Any, alone: Alone) -> None:
    right = alone(3)
    with ThreadPoolExecutor(8) as pool:
        names = ["nobody", "a3"] * 4
        futures = [pool.submit(server.complete, name, world.prompt(3)) for name in names]
    for name, future in zip(names, futures, strict=True):
        if name == "nobody":
            with pytest.raises(server.Refused, match=r"404.*nobody"):
                future.result()
        else:
            future.result().assert_same(right, name)
