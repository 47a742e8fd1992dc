"""Tensors into a model: as the installed PEFT does it, all or nothing."""

import pickle
import warnings

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import pylora
from pylora.checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from pylora.checkpoint.save import write_weights


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def random_checkpoint(model):
    torch.manual_seed(5)
    return {key: torch.randn_like(tensor) for key, tensor in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    ],
    ids=str,
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_same_result_as_peft_on_its_models(llama, wrap, fields, low_cpu_mem_usage):
    models = [wrap(peft, llama(), **fields) for _ in range(2)]
    checkpoint = random_checkpoint(models[0])
    checkpoint["base_model.model.no.such.lora_A.weight"] = torch.zeros(1)
    checkpoint["nowhere"] = torch.zeros(1)
    absent = next(key for key in checkpoint if "lora_B" in key)
    del checkpoint[absent]
    arguments = {"low_cpu_mem_usage": low_cpu_mem_usage}
    theirs = peft.set_peft_model_state_dict(models[0], dict(checkpoint), **arguments)
    ours = set_peft_model_state_dict(models[1], checkpoint, **arguments)
    assert_same_state(models[1], snapshot(models[0]))
    assert type(ours) is type(theirs)
    assert ours.missing_keys == theirs.missing_keys
    assert sorted(ours.unexpected_keys) == sorted(theirs.unexpected_keys)


def test_the_name_may_be_another_one(mlp, wrap):
    saved = get_peft_model_state_dict(wrap(pylora, mlp(), target_modules=["lin0"]))
    model = wrap(pylora, mlp(), adapter_name="renamed", seed=2, target_modules=["lin0"])
    result = set_peft_model_state_dict(model, saved, adapter_name="renamed")
    assert result.unexpected_keys == []
    assert not any("lora_" in key for key in result.missing_keys)
    for key, tensor in get_peft_model_state_dict(model, adapter_name="renamed").items():
        assert torch.equal(tensor, saved[key])
    with pytest.raises(KeyError, match="other"):
        set_peft_model_state_dict(model, saved, adapter_name="other")


def test_a_checkpoint_with_prefix_fits_an_injected_model(mlp, wrap):
    from pylora.model.mapping import inject_adapter_in_model

    fields = {"target_modules": ["lin0"], "modules_to_save": ["head"], "bias": "lora_only"}
    saved = get_peft_model_state_dict(wrap(pylora, mlp(), **fields))
    model = inject_adapter_in_model(pylora.LoraConfig(r=4, **fields), mlp())
    for checkpoint in (saved, {key.removeprefix("base_model.model."): value for key, value in saved.items()}):
        model.lin0.lora_A.default.weight.data.zero_()
        result = set_peft_model_state_dict(model, checkpoint)
        assert result.unexpected_keys == []
        assert torch.equal(model.lin0.lora_A.default.weight, saved["base_model.model.lin0.lora_A.weight"])
        assert torch.equal(model.head.modules_to_save.default.weight, saved["base_model.model.head.weight"])


def test_tensors_are_copied_or_take_the_place(mlp, wrap):
    saved = get_peft_model_state_dict(wrap(pylora, mlp(), target_modules=["lin0"]))
    key = "base_model.model.lin0.lora_A.weight"

    model = wrap(pylora, mlp(), seed=2, target_modules=["lin0"])
    parameter = model.base_model.model.lin0.lora_A.default.weight
    set_peft_model_state_dict(model, saved)
    assert model.base_model.model.lin0.lora_A.default.weight is parameter
    assert parameter.data_ptr() != saved[key].data_ptr()

    config = pylora.LoraConfig(r=4, target_modules=["lin0"])
    model = pylora.get_peft_model(mlp(), config, low_cpu_mem_usage=True)
    assert model.base_model.model.lin0.lora_A.default.weight.is_meta
    set_peft_model_state_dict(model, saved, low_cpu_mem_usage=True)
    parameter = model.base_model.model.lin0.lora_A.default.weight
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.requires_grad
    assert torch.equal(parameter, saved[key])


class TestWrongShapes:
    KEYS = ("base_model.model.lin1.lora_A.weight", "base_model.model.head.bias")

    @pytest.fixture(params=KEYS)
    def model_and_bad(self, request, mlp, wrap):
        model = wrap(pylora, mlp(), target_modules=["lin0", "lin1"], modules_to_save=["head"])
        bad = {key: tensor + 1 for key, tensor in get_peft_model_state_dict(model).items()}
        bad[request.param] = torch.zeros(2, 2)
        return model, bad

    def test_nothing_is_copied(self, model_and_bad):
        model, bad = model_and_bad
        before = snapshot(model)
        with pytest.raises(RuntimeError, match=r"size mismatch for .*default"):
            set_peft_model_state_dict(model, bad)
        assert_same_state(model, before)

    def test_the_others_are_copied_when_told_so(self, model_and_bad):
        model, bad = model_and_bad
        before = snapshot(model)
        with pytest.warns(UserWarning, match=r"Some weights of PeftModel were not initialized.*torch.Size\(\[2, 2\]\)"):
            result = set_peft_model_state_dict(model, bad, ignore_mismatched_sizes=True)
        left_out = [key for key in result.missing_keys if "default" in key]
        assert len(left_out) == 1
        assert torch.equal(model.state_dict()[left_out[0]], before[left_out[0]])
        copied = "base_model.model.lin0.lora_A.default.weight"
        assert torch.equal(model.state_dict()[copied], before[copied] + 1)


def test_modules_to_save_must_be_there(mlp, wrap):
    model = wrap(pylora, mlp(), target_modules=["lin0"], modules_to_save=["head"])
    checkpoint = get_peft_model_state_dict(model)
    checkpoint = {key: tensor + 1 for key, tensor in checkpoint.items() if "head.bias" not in key}
    before = snapshot(model)
    with pytest.raises(KeyError, match=r"head\.bias"):
        set_peft_model_state_dict(model, checkpoint)
    assert_same_state(model, before)


@pytest.mark.parametrize(
    "spoil",
    [torch.Tensor.to_sparse, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)],
    ids=["sparse", "int8"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_tensor_that_cannot_be_copied_is_found_before_any_is(mlp, wrap, spoil):
    model = wrap(pylora, mlp(), target_modules=["lin0"])
    good = {"base_model.model.norm.weight": torch.zeros(12), **random_checkpoint(model)}
    before = snapshot(model)
    last = next(reversed(good))
    with pytest.raises(RuntimeError, match="expected a dense tensor"):
        set_peft_model_state_dict(model, {**good, last: spoil(good[last])})
    assert_same_state(model, before)


def test_other_methods_are_refused(mlp, wrap):
    model = wrap(peft, mlp(), target_modules=["lin0"])
    model.peft_config["default"].peft_type = "IA3"
    with pytest.raises(ValueError, match="peft_type"):
        set_peft_model_state_dict(model, {})


class TestFiles:
    @pytest.fixture
    def tensors(self):
        torch.manual_seed(0)
        return {
            "base_model.model.q.lora_A.weight": torch.randn(2, 3),
            "base_model.model.q.lora_B.weight": torch.ones(3, 2),
        }

    @pytest.mark.parametrize("safe", [True, False])
    def test_round_trip(self, tensors, tmp_path, safe):
        write_weights(tensors, tmp_path, safe_serialization=safe)
        ours, theirs = load_peft_weights(tmp_path), peft.utils.load_peft_weights(str(tmp_path))
        assert set(ours) == set(theirs) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(ours[key], tensor)
            assert torch.equal(theirs[key], tensor)
            assert ours[key].device.type == "cpu"

    def test_subfolder_and_key_mapping(self, tensors, tmp_path):
        write_weights(tensors, tmp_path / "sub")
        found = load_peft_weights(str(tmp_path), subfolder="sub", key_mapping={"^q": "k"})
        assert set(found) == {"base_model.model.k.lora_A.weight", "base_model.model.k.lora_B.weight"}

    @pytest.mark.parametrize("keep", [0, 5, 60, -1])
    def test_truncated_safetensors(self, tensors, tmp_path, keep):
        write_weights(tensors, tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(SafetensorError):
            load_peft_weights(tmp_path)

    @pytest.mark.parametrize("keep", [0, 40, -30])
    def test_truncated_bin(self, tensors, tmp_path, keep):
        write_weights(tensors, tmp_path, safe_serialization=False)
        path = tmp_path / "adapter_model.bin"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
            load_peft_weights(tmp_path)

    def test_bin_is_never_unpickled_beyond_tensors(self, tmp_path):
        marker = tmp_path / "ran"

        class Attack:
            def __reduce__(self):
                return open, (str(marker), "w")

        torch.save({"x": Attack()}, tmp_path / "adapter_model.bin")
        with pytest.raises(pickle.UnpicklingError):
            load_peft_weights(tmp_path)
        assert not marker.exists()

    @pytest.mark.parametrize("content", [[1, 2], {"a": "text"}, torch.zeros(2), {0: torch.zeros(2)}])
    def test_bin_with_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match="dictionary of tensors"):
            load_peft_weights(tmp_path)


class TestWriting:
    def test_shared_views_and_strided_tensors(self, tmp_path):
        big = torch.arange(24.0).reshape(4, 6)
        tensors = {"a": big, "same": big, "view": big[:2], "strided": big.t()}
        for safe in (True, False):
            write_weights(tensors, tmp_path / str(safe), safe_serialization=safe)
            found = load_peft_weights(tmp_path / str(safe))
            for key, tensor in tensors.items():
                assert torch.equal(found[key], tensor)
                assert found[key].untyped_storage().nbytes() == tensor.nbytes
        assert big.shape == (4, 6)
        assert tensors["strided"].data_ptr() == big.data_ptr()

    def test_format_is_in_the_header(self, tmp_path):
        from safetensors import safe_open

        write_weights({"a": torch.zeros(1)}, tmp_path)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        write_weights({"a": torch.ones(3)}, tmp_path)
        before = (tmp_path / "adapter_model.safetensors").read_bytes()
        with pytest.raises(Exception):  # noqa: B017  # a meta tensor has no data; which error that is, is torch's matter
            write_weights({"a": torch.ones(3), "b": torch.ones(3, device="meta")}, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == before

    def test_dtypes_stay(self, tmp_path):
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        write_weights({str(dtype): torch.ones(2, dtype=dtype) for dtype in dtypes}, tmp_path)
        found = load_file(tmp_path / "adapter_model.safetensors")
        assert {key: str(tensor.dtype) for key, tensor in found.items()} == {str(d): str(d) for d in dtypes}


def test_no_warning_where_all_is_well(llama, wrap, tmp_path):
    model = wrap(pylora, llama(), target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_weights(get_peft_model_state_dict(model), tmp_path)
        set_peft_model_state_dict(model, load_peft_weights(tmp_path))


def test_a_file_loaded_from_may_be_written_over(mlp, wrap, tmp_path):
    """Tensors that still lie in the mapped file keep their values when a new save replaces it."""
    tensors = {"base_model.model.lin0.lora_A.weight": torch.ones(4, 10)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = load_peft_weights(tmp_path)
    write_weights({key: tensor * 2 for key, tensor in loaded.items()}, tmp_path)
    assert torch.equal(loaded["base_model.model.lin0.lora_A.weight"], torch.ones(4, 10))
    assert torch.equal(load_peft_weights(tmp_path)["base_model.model.lin0.lora_A.weight"], torch.full((4, 10), 2.0))
