"""Arithmetic on task tensors, number for number beside PEFT's."""

import importlib
import math

import pytest
import torch

from pylora.combine import arithmetic as mine

theirs = pytest.importorskip("peft.utils.merge_utils")


def tasks(count=3, shape=(13, 17), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


WEIGHTS = [torch.tensor([1.0, 0.5, 2.0]), torch.tensor([-1.0, 0.0, 0.25])]


def both(name, *args, **kwargs):
    results = []
    for module in (mine, theirs):
        torch.manual_seed(3)
        results.append(getattr(module, name)(*args, **kwargs))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["positive", "signed"])
@pytest.mark.parametrize("shape", [(13, 17), (4, 3, 2, 5), (7,)])
def test_task_arithmetic(shape, weights, dtype):
    result, expected = both("task_arithmetic", tasks(shape=shape, dtype=dtype), weights)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["positive", "signed"])
@pytest.mark.parametrize("name", ["magnitude_prune", "dare_linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruned_sums(name, weights, density, dtype):
    result, expected = both(name, tasks(dtype=dtype), weights, density)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["positive", "signed"])
@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_votes(name, weights, method, density):
    result, expected = both(name, tasks(), weights, density, method)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_with_many_ties_keep_exactly_as_many(dtype):
    tensor = tasks(1, (60, 50), dtype)[0]
    for density in (0.1, 0.5, 0.9):
        kept = mine.magnitude_based_pruning(tensor, density)
        assert int((kept != 0).sum()) == int(density * tensor.numel())
        dropped = tensor[kept == 0].abs().max()
        assert kept[kept != 0].abs().min() >= dropped
        assert torch.equal(kept[kept != 0], tensor[kept != 0])


def test_equal_magnitudes_and_views():
    tensor = torch.ones(4, 6).t()
    kept = mine.magnitude_based_pruning(tensor, 0.5)
    assert kept.sum() == 12
    assert torch.equal(tensor, torch.ones(6, 4))
    assert torch.equal(mine.magnitude_based_pruning(torch.zeros(5), 0.4), torch.zeros(5))


def test_no_number_left():
    assert not mine.magnitude_based_pruning(torch.ones(5), 0.1).any()
    result, expected = both("ties", tasks(), WEIGHTS[0], 0.001)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [1, 1.5])
def test_nothing_pruned_warns(name, density):
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        result, expected = both(name, tasks(), WEIGHTS[0], density)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("module", [mine, theirs])
def test_errors(module):
    with pytest.raises(ValueError, match="Density should be >= 0"):
        module.prune(torch.ones(3), -0.1, "magnitude")
    with pytest.raises(ValueError, match="Unknown method"):
        module.prune(torch.ones(3), 0.5, "other")
    with pytest.raises(RuntimeError, match="Unimplemented mask method"):
        module.ties(tasks(), WEIGHTS[0], 0.5, "other")


def test_random_pruning_keeps_the_mean():
    torch.manual_seed(0)
    kept = mine.prune(torch.ones(100, 100), 0.3, "random", rescale=True)
    assert math.isclose(float(kept.mean()), 1.0, abs_tol=0.05)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}


def test_the_names_of_peft_are_all_there():
    module = importlib.import_module("pylora.combine.arithmetic")
    names = [name for name, value in vars(theirs).items() if getattr(value, "__module__", "") == theirs.__name__]
    assert len(names) > 8
    assert all(hasattr(module, name) for name in names)
