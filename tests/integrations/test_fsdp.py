"""The wrap policy for fully sharded data parallelism."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.wrap import _recursive_wrap
from transformers import BertConfig, BertModel

import pylora
from pylora.integrations.fsdp import no_split_modules
from pylora.utils.other import fsdp_auto_wrap_policy


class Unit(nn.Module):
    """Stands for a unit of FSDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def adapted():
    config = BertConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    return pylora.get_peft_model(BertModel(config), pylora.LoraConfig(target_modules=["query"], r=2))


def units(model, **settings):
    policy = fsdp_auto_wrap_policy(model)
    _recursive_wrap(model, auto_wrap_policy=policy, wrapper_cls=Unit, ignored_modules=set(), ignored_params=set())
    return [type(module.module).__name__ for module in model.modules() if isinstance(module, Unit)]


def test_blocks_and_trainable_leaves_are_units():
    found = units(adapted())
    assert found.count("BertLayer") == 2
    assert found.count("Linear") == 4  # A and B of two layers
    assert set(found) <= {"BertLayer", "Linear", "BertEmbeddings", "BertModel"}


def test_the_environment_names_the_blocks(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertIntermediate,BertOutput")
    found = units(adapted())
    assert found.count("BertIntermediate") == found.count("BertOutput") == 2
    assert "BertLayer" not in found
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Nothing")
    with pytest.raises(TypeError, match=r"Could not find the transformer layer class to wrap.*Nothing"):
        fsdp_auto_wrap_policy(adapted())


def test_a_model_without_names_wraps_its_trainable_leaves():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    assert no_split_modules(model) == set()
    assert units(model) == ["Linear"]
