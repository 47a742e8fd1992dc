"""aLoRA on a language model: offsets of a forward and of a generation, caches, mixed batches, checkpointing."""

import copy

import peft
import pytest
import torch
from torch.testing import assert_close

import pylora
from pylora.model.alora import get_alora_offsets_for_forward, get_alora_offsets_for_generate

INVOCATION = [7, 8]
IDS = torch.tensor([[3, 7, 8, 4, 5, 6], [3, 4, 5, 6, 7, 9], [7, 8, 9, 7, 8, 1]])
OFFSETS = [5, None, 3]


def config(lib=pylora, tokens=INVOCATION, **fields):
    return lib.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        alora_invocation_tokens=tokens,
        **fields,
    )


def make(lib, base, **adapters):
    """The base model with adapters by name, random ones, the first of them active."""
    adapters = adapters or {"default": config(lib)}
    first = next(iter(adapters))
    model = lib.get_peft_model(copy.deepcopy(base), adapters[first], adapter_name=first)
    for name in list(adapters)[1:]:
        model.add_adapter(name, adapters[name])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            if "lora_" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def base(make_transformer):
    return make_transformer("llama")


@pytest.fixture
def model(base):
    return make(pylora, base).eval()


@pytest.fixture
def theirs(base):
    return make(peft, base).eval()


def no_hooks(model):
    return not any(
        "offsets" in str(hook) or "before_forward" in str(hook)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


class TestForward:
    def test_as_peft(self, model, theirs):
        out = model(input_ids=IDS).logits
        assert_close(out, theirs(input_ids=IDS).logits)
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
        assert_close(out[0, :1], base[0, :1])
        assert_close(out[1], base[1])
        assert (out[0, 1:] != base[0, 1:]).any(-1).all()
        assert no_hooks(model)

    def test_given_offsets_are_kept(self, model, theirs):
        out = model(input_ids=IDS, alora_offsets=[1, 2, 3]).logits
        assert_close(out, theirs(input_ids=IDS, alora_offsets=[1, 2, 3]).logits)
        assert_close(model(input_ids=IDS, alora_offsets=OFFSETS).logits, model(input_ids=IDS).logits)

    def test_embeddings_alone_tell_nothing(self, model):
        embeds = model.get_input_embeddings()(IDS)
        with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets when only inputs_embeds are provided"):
            out = model(inputs_embeds=embeds).logits
        with model.disable_adapter():
            assert_close(out, model(input_ids=IDS).logits)

    def test_a_model_without_a_task(self, base):
        plain_task = config()
        plain_task.task_type = None
        model = make(pylora, base, default=plain_task).eval()
        kwargs = get_alora_offsets_for_forward(model, IDS)
        assert kwargs == {"alora_offsets": OFFSETS}
        assert_close(model(input_ids=IDS, **kwargs).logits, make(pylora, base).eval()(input_ids=IDS).logits)

    def test_nothing_is_added_without_alora(self, base):
        model = make(pylora, base, default=pylora.LoraConfig(task_type="CAUSAL_LM"))
        assert get_alora_offsets_for_forward(model, IDS, use_cache=True) == {"use_cache": True}
        assert get_alora_offsets_for_generate(model, IDS, use_cache=True) == {"use_cache": True}

    def test_gradients_as_peft(self, model, theirs):
        for each in (model, theirs):
            each(input_ids=IDS, labels=IDS).loss.backward()
        expected = {name: param.grad for name, param in theirs.named_parameters()}
        for name, param in model.named_parameters():
            if "lora_" in name:
                assert_close(param.grad, expected[name], msg=name)

    def test_a_failure_leaves_no_hooks(self, model):
        with pytest.raises(ValueError, match="alora_offsets: expected one for each"):
            model(input_ids=IDS, alora_offsets=[1])
        assert no_hooks(model)


class TestGenerate:
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_as_peft(self, model, theirs, use_cache):
        kwargs = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
        mask = torch.ones_like(IDS)
        out = model.generate(input_ids=IDS, attention_mask=mask, **kwargs)
        assert torch.equal(out, theirs.generate(input_ids=IDS, attention_mask=mask, **kwargs))
        assert torch.equal(out, model.generate(IDS, attention_mask=mask, **kwargs))
        assert no_hooks(model)

    def test_generated_tokens_are_the_adapter_s(self, model):
        """Step by step with the cache as all at once with offsets that grow with the sequence."""
        prompt = IDS[:1]
        out = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        grown = prompt
        for _ in range(4):
            offsets = [grown.shape[1] - 1]
            token = model(input_ids=grown, alora_offsets=offsets).logits[:, -1].argmax(-1, keepdim=True)
            grown = torch.cat([grown, token], 1)
        assert torch.equal(out, grown)

    def test_a_cache_of_the_base_model_serves(self, model):
        """What stands before the invocation is the base model's, so its cache can be used."""
        prompt = torch.tensor([[3, 4, 5, 7, 8, 6]])
        kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        with model.disable_adapter():
            cache = model(input_ids=prompt[:, :3], use_cache=True).past_key_values
        out = model.generate(input_ids=prompt, past_key_values=cache, **kwargs)
        assert torch.equal(out, model.generate(input_ids=prompt, **kwargs))

    def test_beam_search_is_refused(self, model):
        with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
            model.generate(input_ids=IDS, num_beams=2, max_new_tokens=2)
        assert no_hooks(model)

    def test_offsets(self, model):
        assert get_alora_offsets_for_generate(model, IDS)["alora_offsets"] == OFFSETS
        assert get_alora_offsets_for_generate(model, input_ids=IDS[0])["alora_offsets"] == OFFSETS[:1]
        with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets during generate"):
            assert get_alora_offsets_for_generate(model)["alora_offsets"] is None


class TestMixedBatch:
    NAMES = ("alora", "plain", "__base__")

    def adapters(self, lib):
        return {"alora": config(lib), "plain": config(lib, None), "other": config(lib, [5])}

    @pytest.mark.parametrize("names", [NAMES, ("other", "alora", "alora"), ("plain", "plain", "other")])
    def test_as_peft(self, base, names):
        outputs = []
        for lib in (pylora, peft):
            model = make(lib, base, **self.adapters(lib)).eval()
            outputs.append(model(input_ids=IDS, adapter_names=list(names)).logits)
        assert_close(*outputs)

    def test_rows_are_those_of_the_adapters_alone(self, base):
        model = make(pylora, base, **self.adapters(pylora)).eval()
        out = model(input_ids=IDS, adapter_names=list(self.NAMES)).logits
        assert_close(out[:1], model(input_ids=IDS[:1]).logits)
        model.set_adapter("plain")
        assert_close(out[1:2], model(input_ids=IDS[1:2]).logits)
        assert_close(model(input_ids=IDS, adapter_names=list(self.NAMES)).logits, out)

    def test_generate(self, base):
        results = []
        for lib in (pylora, peft):
            model = make(lib, base, **self.adapters(lib)).eval()
            kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "adapter_names": list(self.NAMES)}
            results.append(model.generate(input_ids=IDS, **kwargs))
        assert torch.equal(*results)


class TestCheckpointing:
    @pytest.fixture(params=[True, False], ids=["reentrant", "not reentrant"])
    def checkpointed(self, model, request):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": request.param})
        return model

    def gradients(self, model):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: param.grad.clone() for name, param in model.named_parameters() if "lora_" in name}

    def test_gradients_are_those_without(self, base, checkpointed):
        expected = self.gradients(make(pylora, base).train())
        for _ in range(2):
            for name, grad in self.gradients(checkpointed).items():
                assert_close(grad, expected[name], msg=name)
            assert no_hooks(checkpointed)

    def test_gradients_where_no_input_needs_one(self, base, model):
        """PEFT's hooks are gone before the first block is computed again."""
        expected = self.gradients(make(pylora, base).train())
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.get_base_model().disable_input_require_grads()
        for name, grad in self.gradients(model).items():
            assert_close(grad, expected[name], msg=name)
        assert no_hooks(model)

    def test_a_second_forward_before_the_backward(self, checkpointed):
        checkpointed(input_ids=IDS, use_cache=False)
        with pytest.raises(ValueError, match="Multiple invocations of PEFT forward hooks"):
            checkpointed(input_ids=IDS, use_cache=False)

    def test_the_base_model_s_forward_in_between(self, checkpointed):
        with checkpointed.disable_adapter():
            checkpointed(input_ids=IDS, use_cache=False)
        self.gradients(checkpointed)

    def test_forwards_without_a_backward(self, checkpointed):
        with torch.no_grad():
            checkpointed(input_ids=IDS, use_cache=False)
        checkpointed.eval()
        checkpointed(input_ids=IDS, use_cache=False)
        assert no_hooks(checkpointed)
        checkpointed.train()
        self.gradients(checkpointed)

    def test_a_failure_leaves_no_hooks(self, checkpointed):
        with pytest.raises(ValueError, match="alora_offsets: expected one for each"):
            checkpointed(input_ids=IDS, alora_offsets=[1], use_cache=False)
        assert no_hooks(checkpointed)
        self.gradients(checkpointed)


class TestLifecycle:
    def test_merging_is_refused_and_changes_nothing(self, model):
        before = copy.deepcopy(model.state_dict())
        for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
            with pytest.raises(NotImplementedError, match="aLoRA does not support"):
                merge()
        assert list(before) == list(model.state_dict())
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])

    @pytest.mark.parametrize("writer", [peft, pylora], ids=["peft writes", "pylora writes"])
    def test_files(self, base, tmp_path, writer):
        written = make(writer, base).eval()
        written.save_pretrained(tmp_path)
        reader = pylora if writer is peft else peft
        read = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert read.peft_config["default"].alora_invocation_tokens == INVOCATION
        assert_close(read(input_ids=IDS).logits, written(input_ids=IDS).logits)

    def test_unload_gives_the_base_model_back(self, base, model):
        assert_close(model.unload()(input_ids=IDS).logits, base(input_ids=IDS).logits)
