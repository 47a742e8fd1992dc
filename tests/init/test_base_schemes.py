"""The schemes that look at the base weight, beside PEFT and against their definitions."""

import math
import warnings

import pytest
import torch
from torch import nn

from pylora.init import BaseAccess, as_it_will_be, base_updates_at_end, find_init, init_adapter

peft = pytest.importorskip("peft")


class Weight:
    """Access to a plain [out, in] tensor."""

    def __init__(self, value):
        self.value = value

    def read(self):
        return as_it_will_be(self.value, self.value)

    def storage(self):
        return self.value

    def write(self, value):
        self.value = value.to(self.value.dtype)


def access(weight):
    return BaseAccess(weight.value, lambda: weight)


class One(nn.Module):
    def __init__(self, out_features, in_features, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.q = nn.Linear(in_features, out_features)


def run_peft(scheme, shape, rank=4, alpha=12, dtype=torch.float32, seed=7):
    model = One(*shape).to(dtype)
    before = model.q.weight.detach().clone()
    config = peft.LoraConfig(target_modules=["q"], r=rank, lora_alpha=alpha, init_lora_weights=scheme)
    torch.manual_seed(seed)
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.q
    return before, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.weight, torch.get_rng_state()


def run_mine(scheme, before, rank=4, alpha=12, seed=7, config=None):
    weight = Weight(before.clone())
    a, b = torch.full((rank, before.shape[1]), math.nan), torch.full((before.shape[0], rank), math.nan)
    torch.manual_seed(seed)
    init_adapter(scheme, a, b, scaling=alpha / rank, base=access(weight), config=config)
    return a, b, weight.value


SHAPES = [(24, 40), (40, 24), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["olora", "OLoRA", "pissa_niter_4", "pissa_niter_0", "orthogonal"])
def test_same_factors_as_peft(scheme, shape):
    before, a, b, weight, state = run_peft(scheme, shape)
    mine_a, mine_b, mine_weight = run_mine(scheme, before)
    signs = (mine_b * b).sum(dim=0).sign() if scheme.startswith("pissa") else 1.0  # free in a decomposition
    torch.testing.assert_close((mine_a.t() * signs).t(), a, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(mine_b * signs, b, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(mine_weight, weight, rtol=1e-5, atol=2e-6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [*SHAPES, (400, 350), (330, 420)])
def test_pissa_takes_what_peft_takes(shape):
    before, a, b, weight, state = run_peft("pissa", shape)
    mine_a, mine_b, mine_weight = run_mine("pissa", before)
    torch.testing.assert_close(mine_b @ mine_a, b @ a, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(mine_weight, weight, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(mine_a.norm(dim=1), a.norm(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine_b.norm(dim=0), mine_a.norm(dim=1), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["olora", "pissa", "pissa_niter_2"])
def test_narrow_base_weights(scheme, dtype):
    before, _, _, weight, _ = run_peft(scheme, (24, 40), dtype=dtype)
    mine_a, mine_b, mine_weight = run_mine(scheme, before)
    assert mine_weight.dtype == dtype
    torch.testing.assert_close(mine_weight, weight)
    whole = mine_weight.float() + 3.0 * mine_b @ mine_a
    torch.testing.assert_close(whole, before.float(), rtol=0, atol=torch.finfo(dtype).eps * float(before.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
@pytest.mark.parametrize(("scheme", "message"), [("olora", "Unsupported data type"), ("pissa", "initialize PiSSA")])
def test_other_dtypes_are_refused(scheme, message, dtype):
    a, b, weight = torch.ones(2, 8), torch.ones(6, 2), Weight(torch.ones(6, 8, dtype=dtype))
    with pytest.raises(TypeError, match=message):
        init_adapter(scheme, a, b, base=access(weight))
    assert (a == 1).all()
    if dtype == torch.float64:
        with pytest.raises(TypeError, match=message):
            run_peft(scheme, (6, 8), dtype=dtype)


@pytest.mark.parametrize("scheme", ["olora", "pissa"])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_rank_beyond_the_weight(scheme, shape):
    before = One(*shape).q.weight.detach()
    a, b, weight = run_mine(scheme, before, rank=9)
    assert a.isfinite().all()
    assert b.isfinite().all()
    torch.testing.assert_close(weight + 12 / 9 * b @ a, before)


def test_orthogonal_product_is_zero():
    a, b, weight = run_mine("orthogonal", torch.ones(30, 20), rank=6)
    assert (b @ a).abs().max() < 1e-6
    assert a.abs().min() > 0
    assert (weight == 1).all()


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ValueError, match="requires the LoRA rank to be even, got 3 instead"):
        run_mine("orthogonal", torch.ones(30, 20), rank=3)


@pytest.mark.parametrize("name", ["pissa_niter", "pissa_niter_", "pissa_niter_x", "pissa_4", "pissa_niter_1_niter_2"])
def test_malformed_pissa_names(name):
    with pytest.raises(ValueError, match="should be 'pissa' or 'pissa_niter_"):
        find_init(name)


@pytest.mark.parametrize("scheme", ["PiSSA", "Pissa_niter_4", "Orthogonal", "LOFTQ"])
def test_names_are_literal_where_peft_s_are(scheme):
    with pytest.raises(ValueError, match="Unknown initialization"):
        find_init(scheme)


@pytest.mark.parametrize("scheme", ["olora", "pissa", "pissa_niter_4", "orthogonal"])
def test_an_embedding_starts_as_always(scheme):
    """As in PEFT, so that one scheme can be given for a model whose embedding is targeted too."""
    a, b = torch.full((4, 30), math.nan), torch.full((8, 4), math.nan)
    torch.manual_seed(0)
    init_adapter(scheme, a, b, embedding=True)
    expected_a, expected_b = torch.empty(4, 30), torch.empty(8, 4)
    torch.manual_seed(0)
    init_adapter(True, expected_a, expected_b, embedding=True)
    assert torch.equal(a, expected_a)
    assert torch.equal(b, expected_b)


@pytest.mark.parametrize("scheme", ["olora", "pissa", "orthogonal"])
def test_a_convolution_is_refused(scheme):
    with pytest.raises(ValueError, match="Unknown initialization"):
        init_adapter(scheme, torch.empty(4, 3, 3, 3), torch.empty(8, 4, 1, 1))


def test_no_base_weight_at_hand():
    with pytest.raises(ValueError, match="base: expected access"):
        init_adapter("pissa", torch.empty(4, 8), torch.empty(8, 4))


class TestLoftQ:
    def settings(self, **kwargs):
        return peft.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1} | kwargs)

    def error(self, before, a, b, weight, scaling):
        return float((weight.float() + scaling * b.flatten(1) @ a.flatten(1) - before).norm() / before.norm())

    @pytest.mark.parametrize("bits", [4, 8])
    def test_repairs_the_quantisation(self, bits):
        before = One(48, 64).q.weight.detach()
        errors = []
        for iterations in (1, 3):
            config = self.settings(loftq_bits=bits, loftq_iter=iterations)
            a, b, weight = run_mine("loftq", before, rank=8, alpha=12, config=config)
            errors.append(self.error(before, a, b, weight, 12 / 8))
            assert not torch.equal(weight, before)
        plain = self.error(before, torch.zeros(8, 64), torch.zeros(48, 8), weight, 1.0)
        assert errors[1] < errors[0] < plain * 0.95
        assert errors[0] < (0.1 if bits == 4 else 0.01)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_quantising_again_changes_nothing(self, bits):
        before = One(48, 64).q.weight.detach()
        _, _, weight = run_mine("loftq", before, config=self.settings(loftq_bits=bits))
        _, _, again = run_mine("loftq", weight, config=self.settings(loftq_bits=bits))
        torch.testing.assert_close(again, weight, rtol=1e-6, atol=1e-7)

    def test_nf4_has_sixteen_levels_a_block(self):
        _, _, weight = run_mine("loftq", One(48, 64).q.weight.detach(), config=self.settings())
        assert all(row.unique().numel() <= 16 for row in weight)

    def test_int8_has_255_levels_a_row(self):
        before = One(8, 4000).q.weight.detach()
        _, _, weight = run_mine("loftq", before, config=self.settings(loftq_bits=8))
        assert all(200 < row.unique().numel() <= 255 for row in weight)
        assert (weight - before).abs().max() <= before.abs().max() / 254 * 1.001

    def test_a_width_that_blocks_do_not_divide(self):
        before = One(7, 13).q.weight.detach()
        a, b, weight = run_mine("loftq", before, config=self.settings())
        assert self.error(before, a, b, weight, 3.0) < 0.1

    def test_convolution_and_embedding(self):
        before = One(12, 3 * 25).q.weight.detach()
        weight = Weight(before.clone())
        a, b = torch.empty(4, 3, 5, 5), torch.empty(12, 4, 1, 1)
        init_adapter("loftq", a, b, base=access(weight), config=self.settings())
        assert self.error(before, a, b, weight.value, 1.0) < 0.1
        weight = Weight(before.clone())
        a, b = torch.empty(4, 75), torch.empty(12, 4)
        init_adapter("loftq", a, b, embedding=True, base=access(weight), config=self.settings())
        assert self.error(before, a, b, weight.value, 1.0) < 0.1
        assert weight.value.t().reshape(-1)[:64].unique().numel() <= 16

    def test_a_grouped_convolution_is_refused(self):
        weight = Weight(torch.ones(12, 18))
        with pytest.raises(ValueError, match="groups > 1"):
            init_adapter(
                "loftq", torch.empty(4, 6, 3), torch.empty(12, 2, 1), base=access(weight), config=self.settings()
            )

    @pytest.mark.parametrize(("key", "value"), [("loftq_bits", 2), ("loftq_bits", 3), ("loftq_iter", 0)])
    def test_bad_settings(self, key, value):
        before = torch.ones(6, 8)
        with pytest.raises(ValueError, match=key):
            run_mine("loftq", before, config=self.settings(**{key: value}))

    def test_integers_are_refused(self):
        with pytest.raises(TypeError, match="floating point"):
            run_mine("loftq", torch.ones(6, 8, dtype=torch.int8), config=self.settings())


class TestPostponedUpdates:
    def start(self, weight, scheme="olora"):
        a, b = torch.empty(2, 8), torch.empty(6, 2)
        init_adapter(scheme, a, b, base=access(weight))
        return a, b

    def test_the_weight_changes_at_the_end(self):
        before = One(6, 8).q.weight.detach()
        weight, at_once = Weight(before.clone()), Weight(before.clone())
        self.start(at_once)
        with base_updates_at_end():
            with base_updates_at_end():
                a, b = self.start(weight)
            assert torch.equal(weight.value, before)
            a.zero_(), b.zero_()  # as when a checkpoint's values take their place
        assert torch.equal(weight.value, at_once.value)

    def test_reading_before_the_end_shows_what_will_be(self):
        before = One(6, 8).q.weight.detach()
        weight, at_once = Weight(before.clone()), Weight(before.clone())
        self.start(at_once)
        self.start(at_once)
        with base_updates_at_end():
            self.start(weight)
            self.start(weight)  # as for a weight that two modules share
            assert torch.equal(weight.read(), at_once.value)
            assert torch.equal(weight.value, before)
        assert torch.equal(weight.value, at_once.value)
        assert torch.equal(weight.read(), at_once.value)

    def test_a_failure_drops_them(self):
        before = One(6, 8).q.weight.detach()
        weight = Weight(before.clone())

        @base_updates_at_end()
        def fail_later():
            self.start(weight)
            raise RuntimeError("later")

        with pytest.raises(RuntimeError, match="later"):
            fail_later()
        assert torch.equal(weight.value, before)
        self.start(weight)
        assert not torch.equal(weight.value, before)

    @pytest.mark.parametrize("scheme", ["olora", "pissa", "pissa_niter_4", "orthogonal", True])
    def test_factors_on_meta(self, scheme):
        before = One(6, 8).q.weight.detach()
        weight = Weight(before.clone())
        a, b = torch.empty(2, 8, device="meta"), torch.empty(6, 2, device="meta")
        with torch.device("meta"):
            init_adapter(scheme, a, b, base=access(weight))
        changes = str(scheme).startswith(("olora", "pissa"))
        assert torch.equal(weight.value, before) is not changes


def test_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_mine("pissa", One(24, 40).q.weight.detach())
