"""A model on two processes, by gloo: accelerate's data parallelism, torch's two kinds of full sharding."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("accelerate")

# Each process takes the same batches, so that losses and weights are to be those of one process.
_SCRIPT = """
import sys
import accelerate, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import pylora
from pylora.integrations.fsdp import fsdp_auto_wrap_policy
from pylora.testing.llama import tiny_llama

folder = sys.argv[1]
accelerator = accelerate.Accelerator(cpu=True)
assert dist.get_world_size() == 2


def adapted():
    torch.manual_seed(0)
    config = pylora.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return pylora.get_peft_model(tiny_llama(layers=2, width=64), config)


def trained(model, backward=torch.Tensor.backward):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(3):
        ids = torch.randint(0, 100, (2, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


expected = adapted()
losses = trained(expected)
tensors = pylora.get_peft_model_state_dict(expected)
assert losses[-1] < losses[0]

model = accelerator.prepare(adapted())
torch.testing.assert_close(trained(model, accelerator.backward), losses, rtol=1e-5, atol=0)
inner = accelerator.unwrap_model(model)
inner.save_pretrained(folder, is_main_process=accelerator.is_main_process)
dist.barrier()
files = pylora.load_peft_weights(folder, device="cpu")
assert files.keys() == tensors.keys()
for name, tensor in tensors.items():
    torch.testing.assert_close(files[name], tensor, rtol=1e-4, atol=1e-6)

model, mesh = adapted(), init_device_mesh("cpu", (2,))
for layer in model.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert isinstance(model, pylora.PeftModel)
torch.testing.assert_close(trained(model), losses, rtol=1e-5, atol=0)
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
found = pylora.get_peft_model_state_dict(model, state_dict=whole)
assert found.keys() == tensors.keys()
for name, tensor in tensors.items():
    torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)

model = adapted()
model = FullyShardedDataParallel(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), device_id=torch.device("cpu"))
torch.testing.assert_close(trained(model), losses, rtol=1e-5, atol=0)
sys.stdout.write(f"passed {dist.get_rank()}\\n")  # one write, which the other process cannot part
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launcher, script, tmp_path / "adapter"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {"passed 0", "passed 1"} <= set(result.stdout.splitlines())
