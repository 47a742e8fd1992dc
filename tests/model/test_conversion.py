"""`path_initial_model_for_weight_conversion`: adapters of changed base weights saved for the original ones."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pylora

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(7, 20)
        self.q = nn.Linear(20, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.q(self.e(x))))


X = torch.arange(7)


def net():
    torch.manual_seed(0)
    return Net()


def trained(lib, folder, scheme="olora", **kwargs):
    """A model whose initial adapter is in `folder`, with other factors than those."""
    options = {"target_modules": ["q"], "r": 4, "lora_alpha": 6, "init_lora_weights": scheme} | kwargs
    torch.manual_seed(0)
    model = lib.get_peft_model(net(), lib.LoraConfig(**options))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder)
    model.peft_config["default"].init_lora_weights = scheme
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


CONFIGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q": 2}},
    {"alpha_pattern": {"q": 5}},
    {"scheme": "pissa"},
    {"scheme": "pissa_niter_4"},
    {"scheme": True},
]


@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize("kwargs", CONFIGS, ids=str)
def test_files_beside_peft(kwargs, safe_serialization, tmp_path):
    folders = []
    for lib in (pylora, peft):
        folder = tmp_path / lib.__name__
        model = trained(lib, folder / "init", **kwargs)
        out = folder / "out"
        model.save_pretrained(
            out, path_initial_model_for_weight_conversion=folder / "init", safe_serialization=safe_serialization
        )
        folders.append(out)
    if safe_serialization:
        mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    else:
        mine, theirs = (torch.load(folder / "adapter_model.bin", weights_only=True) for folder in folders)
    assert mine.keys() == theirs.keys()
    if str(kwargs.get("scheme")).startswith("pissa"):  # singular vectors have free signs, which training then followed
        assert all(mine[key].shape == theirs[key].shape for key in mine)
    else:
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=3e-6)
    texts = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert texts[0].pop("auto_mapping").keys() == texts[1].pop("auto_mapping").keys()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kwargs", CONFIGS, ids=str)
def test_loads_onto_the_original_weights(kwargs, tmp_path):
    model = trained(pylora, tmp_path / "init", **kwargs)
    before = model.peft_config["default"].to_dict()
    files = {path: path.read_bytes() for path in (tmp_path / "init").iterdir()}
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    assert model.peft_config["default"].to_dict() == before
    assert list(model.peft_config) == ["default"]
    assert {path: path.read_bytes() for path in (tmp_path / "init").iterdir()} == files
    loaded = pylora.PeftModel.from_pretrained(net(), tmp_path / "out")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(loaded.base_model.model.q.weight, net().q.weight)
    rank = 2 * model.base_model.model.q.r["default"]
    assert loaded.base_model.model.q.lora_A["default"].weight.shape[0] == rank
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "out")
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["olora", "pissa"])
def test_heads_and_embeddings_go_along(scheme, tmp_path):
    """PEFT leaves out what is neither lora_A nor lora_B."""
    kwargs = {"target_modules": ["q", "e"], "modules_to_save": ["head"], "scheme": scheme}
    model = trained(pylora, tmp_path / "init", **kwargs)
    model.save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "init", save_embedding_layers=False
    )
    loaded = pylora.PeftModel.from_pretrained(net(), tmp_path / "out")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)


def test_dora_keeps_its_magnitudes(tmp_path):
    model = trained(pylora, tmp_path / "init", use_dora=True)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "init")
    loaded = pylora.PeftModel.from_pretrained(net(), tmp_path / "out")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA")
@pytest.mark.parametrize("pattern", [{"rank_pattern": {"q": 2}}, {"alpha_pattern": {"q": 5}}], ids=str)
def test_rslora_with_patterns_is_refused(pattern, tmp_path):
    for lib in (pylora, peft):
        folder = tmp_path / lib.__name__
        model = trained(lib, folder / "init", use_rslora=True, **pattern)
        with pytest.raises(ValueError, match="`path_initial_model_for_weight_conversion` to `save_pretrained` is not"):
            model.save_pretrained(folder / "out", path_initial_model_for_weight_conversion=folder / "init")
        if lib is pylora:
            assert not (folder / "out").exists()


def test_an_initial_adapter_that_does_not_fit(tmp_path):
    model = trained(pylora, tmp_path / "init")
    other = pylora.get_peft_model(nn.Sequential(nn.Linear(4, 4)), pylora.LoraConfig(target_modules=["0"]))
    other.save_pretrained(tmp_path / "other")
    for wrong in ("other", "absent"):
        with pytest.raises(ValueError):
            model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / wrong)
    assert not (tmp_path / "out").exists()


def test_subtract_mutated_init_beside_peft(tmp_path):
    results = []
    for lib in (pylora, peft):
        folder = tmp_path / lib.__name__
        model = trained(lib, folder)
        model.load_adapter(folder, "initial")
        tensors = lib.get_peft_model_state_dict(model)
        results.append(model.base_model.subtract_mutated_init(tensors, "initial", {}))
    mine, theirs = results
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=3e-6)
    with pytest.raises(KeyError):
        model.base_model.subtract_mutated_init({}, "absent", {})
