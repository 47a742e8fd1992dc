"""Which state dict keys belong to adapters, beside PEFT's answer."""

import pytest
from torch import nn

import pylora
from pylora.checkpoint.keys import select_under
from pylora.checkpoint.structure import adapter_prefixes

peft_utils = pytest.importorskip("peft.tuners.tuners_utils")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.lin = nn.Linear(4, 4)
        self.lora_like = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lora_like(self.lin(self.emb(x))))


def make(library):
    fields = {"target_modules": ["lin", "emb"], "modules_to_save": ["head"]}
    model = library.get_peft_model(Net(), library.LoraConfig(**fields))
    model.add_adapter("other", library.LoraConfig(target_modules=["lin", "lora_like"]))
    return model


@pytest.mark.parametrize("adapter_name", [None, "default", "other", "nobody"])
@pytest.mark.parametrize("inside", [False, True])
def test_prefixes_select_the_keys_that_peft_s_do(adapter_name, inside):
    import peft

    own, other = make(pylora), make(peft)
    if inside:
        own, other = own.base_model.model, other.base_model.model
    wanted = peft_utils._filter_state_dict_by_key_prefixes(
        other.state_dict(), peft_utils._get_tuner_state_dict_key_prefixes(other, adapter_name)
    )
    assert set(select_under(own.state_dict(), adapter_prefixes(own, adapter_name))) == set(wanted)
    assert wanted or adapter_name == "nobody"
