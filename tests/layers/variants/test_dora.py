"""DoRA on every kind of layer, beside the installed PEFT."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import pylora
from pylora.layers.variants import DoraLinearVariant
from pylora.ops import draw_rng
from pylora.ops.reference import dora as reference

MERGEABLE = ["emb", "lin", "nobias", "tr", "conv1", "conv2", "conv3"]
TARGETS = [*MERGEABLE, "grouped"]


def same(ours, theirs, **tolerances):
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, **{"atol": 2e-5, "rtol": 2e-5, **tolerances})


def loss(outputs):
    return sum(out.float().square().sum() for out in outputs)


class TestBesidePeft:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"lora_dropout": 0.3},
            {"use_rslora": True},
            {"names": ("one", "two", "three")},
            {"names": ("one", "two"), "lora_dropout": 0.4},
            {"base_seed": 3, "r": 8, "bias": "lora_only"},
        ],
        ids=str,
    )
    def test_outputs_and_gradients(self, both, config, training, ids):
        theirs, ours = both(**config)
        results = []
        if training and "lora_dropout" in config:  # a hook keeps torch's dropout, whose masks PEFT's are
            for module in ours.modules():
                if isinstance(module, nn.Dropout):
                    module.register_forward_hook(lambda *args: None)
        for model in (ours, theirs):
            model.train(training)
            torch.manual_seed(1)
            out = model(ids)
            loss(out).backward()
            results.append(out)
        same(*results)
        expected = {name: param.grad for name, param in theirs.named_parameters()}
        for name, param in ours.named_parameters():
            assert (param.grad is None) == (expected[name] is None), name
            if param.grad is not None:
                assert_close(param.grad, expected[name], atol=1e-3, rtol=1e-3, msg=name)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_base(self, both, dtype, ids):
        theirs, ours = both(dtype=dtype)
        assert {param.dtype for name, param in ours.named_parameters() if "lora_" in name} == {torch.float32}
        same(ours(ids), theirs(ids), atol=2e-2, rtol=2e-2)
        assert all(out.dtype == dtype for out in ours(ids))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_magnitudes_start_as_peft_s(self, dtype, Zoo):
        made = []
        for lib in (pylora, peft):
            torch.manual_seed(0)
            model = Zoo().to(dtype)
            config = lib.LoraConfig(target_modules=TARGETS, r=4, use_dora=True)
            made.append(lib.get_peft_model(model, config, autocast_adapter_dtype=False).state_dict())
        for key, value in made[1].items():
            if "magnitude" in key:
                assert value.dtype == made[0][key].dtype == dtype
                assert_close(made[0][key], value)

    def test_autocast(self, both, ids):
        theirs, ours = both(targets=["lin", "nobias", "tr"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(ours(ids), theirs(ids), atol=2e-2, rtol=2e-2)

    def test_scale(self, both, ids):
        theirs, ours = both()
        for model in (theirs, ours):
            for module in model.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", 2.5)
        same(ours(ids), theirs(ids))

    def test_disabled_and_enabled_again(self, both, ids):
        theirs, ours = both()
        before = ours(ids)
        with ours.disable_adapter(), theirs.disable_adapter():
            same(ours(ids), theirs(ids))
        same(ours(ids), before)

    @pytest.mark.parametrize("writer", [peft, pylora], ids=["peft writes", "pylora writes"])
    def test_files(self, tmp_path, writer, make, Zoo, ids):
        reader = pylora if writer is peft else peft
        written = make(writer)
        written.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors")
        assert "base_model.model.lin.lora_magnitude_vector" in keys
        assert keys["base_model.model.conv2.lora_magnitude_vector"].shape == (1, 3, 1, 1)
        assert not any(key.endswith("vector.weight") for key in keys)
        torch.manual_seed(0)
        read = reader.PeftModel.from_pretrained(Zoo(), tmp_path)
        same(read(ids), written.eval()(ids))

    def test_delta_weight_is_plain_lora_s(self, both):
        theirs, ours = both(targets=MERGEABLE)
        for name in MERGEABLE:
            mine, other = (
                getattr(model.base_model.model, name).get_delta_weight("default") for model in (ours, theirs)
            )
            assert_close(mine, other)

    def test_mixed_batch_is_served_where_peft_refuses_it(self, both, ids):
        theirs, ours = (model.eval() for model in both())
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
            theirs(ids, adapter_names=["default", "__base__"])
        mixed, alone = ours(ids, adapter_names=["default", "__base__"]), ours(ids)
        with ours.disable_adapter():
            base = ours(ids)
        assert len(mixed) == len(alone) == len(base)
        for output, with_adapter, without in zip(mixed, alone, base, strict=True):
            assert_close(output[0], with_adapter[0])
            assert_close(output[1], without[1])


class TestStart:
    def test_nothing_changes_at_first(self, Zoo, ids):
        torch.manual_seed(0)
        base = Zoo()
        before = base(ids)
        model = pylora.get_peft_model(base, pylora.LoraConfig(target_modules=TARGETS, r=4, use_dora=True))
        same(model(ids), before)

    @pytest.mark.parametrize("scheme", ["pissa", "olora"])
    def test_nothing_changes_at_first_where_the_scheme_changes_the_base_weight(self, scheme, Zoo, ids):
        torch.manual_seed(0)
        base = Zoo()
        before = base(ids)
        config = pylora.LoraConfig(target_modules=["lin", "tr"], r=4, use_dora=True, init_lora_weights=scheme)
        same(pylora.get_peft_model(base, config)(ids), before, atol=1e-4)

    def test_on_meta(self, Zoo):
        config = pylora.LoraConfig(target_modules=TARGETS, r=4, use_dora=True)
        light = pylora.get_peft_model(Zoo(), copy.deepcopy(config), low_cpu_mem_usage=True).state_dict()
        for key, value in pylora.get_peft_model(Zoo(), config).state_dict().items():
            assert light[key].shape == value.shape
            assert light[key].dtype == value.dtype
            assert light[key].is_meta == ("lora_" in key)

    def test_low_memory_load(self, tmp_path, make, Zoo, ids):
        written = make(pylora)
        written.save_pretrained(tmp_path)
        torch.manual_seed(0)
        read = pylora.PeftModel.from_pretrained(Zoo(), tmp_path, low_cpu_mem_usage=True)
        same(read(ids), written.eval()(ids))

    def test_ephemeral_offload_is_accepted(self, make, ids):
        runtime = pylora.LoraRuntimeConfig(ephemeral_gpu_offload=True)
        model = make(pylora, runtime_config=runtime)
        assert model.base_model.model.lin.ephemeral_gpu_offload
        same(model(ids), make(pylora)(ids))

    def test_rows_of_zeros_stay_finite(self, Zoo, ids):
        torch.manual_seed(0)
        base = Zoo()
        with torch.no_grad():
            base.lin.weight[2] = 0
        model = pylora.get_peft_model(base, pylora.LoraConfig(target_modules=["lin"], use_dora=True, r=4))
        loss(model(ids)).backward()
        assert all(out.isfinite().all() for out in model(ids))
        weight = base.lin.base_layer.weight.clone()
        model.merge_adapter()
        model.unmerge_adapter()
        assert_close(base.lin.base_layer.weight, weight)

    def test_added_beside_a_merged_adapter_takes_the_unmerged_norms(self, make):
        fresh, used = make(pylora, targets=["lin"]), make(pylora, targets=["lin"])
        used.merge_adapter()
        config = pylora.LoraConfig(target_modules=["lin"], use_dora=True, r=4)
        for model in (fresh, used):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.add_adapter("later", copy.deepcopy(config))
        magnitudes = [m.base_model.model.lin.lora_magnitude_vector["later"].weight for m in (fresh, used)]
        assert_close(*magnitudes)

    def test_a_plain_adapter_takes_the_place_of_a_dora_one(self, make):
        layer = make(pylora, targets=["lin"]).base_model.model.lin
        layer.update_layer("default", 4, lora_alpha=4, config=pylora.LoraConfig(r=4))
        assert not layer.lora_variant
        assert not len(layer.lora_magnitude_vector)
        assert not layer.use_dora["default"]

    def test_quantised_base_weight_is_refused_before_anything_changes(self, make):
        layer = make(pylora, targets=["lin"], use_dora=False).base_model.model.lin
        layer.base_layer.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(pylora.UnsupportedFeatureError, match="use_dora"):
            layer.update_layer("new", 4, lora_alpha=4, config=pylora.LoraConfig(r=4, use_dora=True))
        assert "new" not in layer.r
        assert "new" not in layer.lora_A

    def test_deletion(self, make):
        model = make(pylora, names=("one", "two"))
        model.delete_adapter("two")
        for module in model.modules():
            if hasattr(module, "lora_variant"):
                assert list(module.lora_variant) == list(module.lora_magnitude_vector) == ["one"]


class TestMerge:
    @pytest.mark.parametrize("safe_merge", [True, False])
    @pytest.mark.parametrize("names", [("one",), ("one", "two"), ("one", "two", "three")], ids=len)
    def test_merged_output_is_the_unmerged_one(self, names, safe_merge, make, ids):
        model = make(pylora, targets=MERGEABLE, names=names).eval()
        expected = model(ids)
        with model.disable_adapter():
            base = model(ids)
        model.merge_adapter(safe_merge=safe_merge)
        same(model(ids), expected)
        model.unmerge_adapter()
        same(model(ids), expected)
        with model.disable_adapter():
            same(model(ids), base)

    def test_one_after_another(self, make, ids):
        names = ("one", "two", "three")
        model = make(pylora, targets=MERGEABLE, names=names).eval()
        expected = model(ids)
        base = {name: param.clone() for name, param in model.named_parameters() if "base_layer" in name}
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.merge_adapter([name])
        same(model(ids), expected, atol=1e-4)
        model.unmerge_adapter()
        for name, param in model.named_parameters():
            if name in base:
                assert_close(param, base[name], atol=1e-5, rtol=1e-5)

    def test_as_peft(self, both, ids):
        theirs, ours = both(targets=MERGEABLE)
        merged = [model.eval().merge_and_unload() for model in (ours, theirs)]
        same(*(model(ids) for model in merged))
        assert list(merged[0].state_dict()) == list(merged[1].state_dict())

    @pytest.mark.parametrize("order", [("plain", "dora"), ("dora", "plain"), ("plain", "dora", "biased")], ids=str)
    def test_beside_plain_adapters(self, order, Zoo, ids):
        """An adapter's own bias is scaled by a DoRA adapter after it, in the forward and so in the merge."""
        torch.manual_seed(0)
        fields = {"target_modules": ["lin", "tr", "conv1"], "r": 4, "init_lora_weights": False}
        kinds = {"plain": {"lora_bias": True}, "biased": {"lora_bias": True}, "dora": {"use_dora": True}}
        model = pylora.get_peft_model(Zoo(), pylora.LoraConfig(**fields, **kinds[order[0]]), adapter_name=order[0])
        for name in order[1:]:
            model.add_adapter(name, pylora.LoraConfig(**fields, **kinds[name]))
        model.base_model.set_adapter(list(order))
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "lora_" in name:
                    param.add_(0.1 * torch.randn_like(param))
        model.eval()
        expected = model(ids)
        state = {name: param.clone() for name, param in model.named_parameters()}
        for one_by_one in (False, True):
            for names in [[name] for name in order] if one_by_one else [list(order)]:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model.merge_adapter(names)
            same(model(ids), expected, atol=1e-4)
            model.unmerge_adapter()
            for name, param in model.named_parameters():
                assert_close(param, state[name], atol=1e-5, rtol=1e-4)

    def test_narrow_weight_is_rounded_once(self, make):
        model = make(pylora, targets=["lin"], names=("one", "two"), dtype=torch.bfloat16).eval()
        layer = model.base_model.model.lin
        weight = layer.base_layer.weight.detach().double()
        total = weight
        for name in ("one", "two"):
            delta = layer.get_delta_weight(name).double()
            norm = (weight + delta).norm(dim=1)
            total = (layer.lora_magnitude_vector[name].weight.double() / norm)[:, None] * (total + delta)
        model.merge_adapter()
        assert_close(layer.base_layer.weight, total.bfloat16())
        assert (layer.base_layer.weight == total.bfloat16()).double().mean() > 0.9

    @pytest.mark.parametrize("use_dora", [True, False])
    @pytest.mark.parametrize("change", ["scale", "magnitude", "removal"])
    def test_later_changes_do_not_spoil_the_unmerge(self, use_dora, change, make):
        model = make(pylora, targets=["lin", "conv2"], use_dora=use_dora).eval()
        layer = model.base_model.model.lin
        before = layer.base_layer.weight.clone()
        layer.merge()
        if change == "scale":
            layer.set_scale("default", 3.0)
        elif change == "removal":
            layer.delete_adapter("default")
        elif use_dora:
            with torch.no_grad():
                layer.lora_magnitude_vector["default"].weight.mul_(2)
        layer.unmerge()
        assert_close(layer.base_layer.weight, before, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_made_while_merged(self, copier, make, ids):
        model = make(pylora, targets=MERGEABLE).eval()
        expected = model(ids)
        model.merge_adapter()
        twin = copier(model)
        twin.unmerge_adapter()
        same(twin(ids), expected)

    def test_grouped_convolution_is_refused(self, make):
        model = make(pylora)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(NotImplementedError, match="groups > 1"):
            model.merge_adapter()
        for key, value in model.state_dict().items():
            assert_close(value, before[key], rtol=0, atol=0)

    def test_a_broken_adapter_changes_nothing(self, make):
        model = make(pylora, targets=["lin", "nobias"], names=("one", "two"))
        with torch.no_grad():
            model.base_model.model.nobias.lora_magnitude_vector["two"].weight[1] = float("nan")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"NaNs detected .* The adapter two"):
            model.merge_adapter(safe_merge=True)
        for key, value in model.state_dict().items():
            assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)

    def test_the_variant_s_own_methods(self, make):
        layer = make(pylora, targets=["tr"]).base_model.model.tr
        variant = layer.lora_variant["default"]
        weight = layer.base_layer.weight.detach()
        merged = variant.merge_safe(layer, "default", weight)
        in_place = weight.clone()
        variant.merge_unsafe(layer, "default", in_place)
        layer.merge()
        for other in (in_place, layer.base_layer.weight):
            assert_close(merged, other.detach())
        assert_close(variant.unmerge(layer, "default", merged), layer._unmerged().weight.t())


def test_a_variant_s_forward_leaves_the_running_result_alone(make):
    layer = make(pylora, targets=["lin"]).base_model.model.lin
    x = torch.randn(3, 8)
    result = layer.base_layer(x)
    before = result.clone()
    DoraLinearVariant.forward(layer, active_adapter="default", x=x, result=result)
    assert_close(result, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lin", "nobias", "tr"])
def test_dropout_in_training_is_that_of_the_op(name, make):
    layer = make(pylora, targets=[name], lora_dropout=0.3).base_model.model.get_submodule(name).train()
    x = torch.randn(7, layer.in_features)
    torch.manual_seed(1)
    actual = layer(x)
    torch.manual_seed(1)
    rng = draw_rng("cpu")
    weight, bias = layer._base_weight().read(), layer.base_layer.bias
    a, b = layer._factors("default")
    scaling = layer.scaling["default"]
    norms = reference.dora_row_norms(weight, a, b, scaling)
    magnitude = layer.lora_magnitude_vector["default"].weight
    expected = reference.dora_linear(x, weight, bias, a, b, magnitude, norms, scaling, 0.3, rng)
    assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_training_reaches_the_same_weights_as_peft(both, ids):
    theirs, ours = both()
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            loss(model(ids)).backward()
            optimizer.step()
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert_close(value, expected[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(make, training):
    model = make(pylora, targets=["lin", "nobias", "emb", "conv2"], lora_dropout=0.1).train(training)
    for name in ("lin", "emb", "conv2"):
        layer = model.base_model.model.get_submodule(name)
        x = {"lin": torch.randn(3, 8), "emb": torch.arange(6), "conv2": torch.randn(2, 1, 6, 6)}[name]
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        actual = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert_close(actual, expected)
        actual.sum().backward()
        assert layer.lora_magnitude_vector["default"].weight.grad is not None
