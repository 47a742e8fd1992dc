"""The benchmark harness: what is measured, in which order, what a record holds, and that a wrong op gets no figure."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pylora.bench import Sweep, Work, benchmark, discovery, gpu, machine, records, runner, selection, session
from pylora.bench.plots import draw
from pylora.bench.table import exceeds_limit, print_outcome
from pylora.bench.timing import measure_in_turns, time_in_turns
from pylora.ops.cost import Cost
from pylora.ops.cost import lora as lora_cost

LIMITS = machine.Limits(gemm_gflop_s=100.0, cache_gb_s=50.0, memory_gb_s=10.0)


def fake_facts() -> dict:
    versions = {"python": "3", "pylora": "0", "torch": "2", "peft": None}
    return {"cpu": "a CPU", "isa": "scalar", "threads": 1, "commit": "abc", "versions": versions, "cores": 1}


def product_cost(rows: int, width: int) -> dict[str, Cost]:
    return {"base": Cost(2 * rows * width, 4 * rows), "pylora": Cost(3 * rows * width, 4 * rows)}


@benchmark(
    base="nothing", table=({}, {"rows": 4}), sweeps=[Sweep("rows", (1, 2, 4)), Sweep("rows", (1, 2), {"width": 9})],
    cost=product_cost,
)  # fmt: skip
def product(rows: int = 2, width: int = 3) -> Work:
    """A product."""
    x = torch.ones(rows, width)
    return Work({"base": lambda: x.sum(), "pylora": lambda: x @ x.t(), "peft": lambda: x.exp()}, lambda: None)


@benchmark(base="nothing")
def wrong() -> Work:
    """An op with a wrong result."""

    def check() -> None:
        torch.testing.assert_close(torch.zeros(1), torch.ones(1))

    return Work({"base": lambda: pytest.fail("timed"), "pylora": lambda: pytest.fail("timed")}, check)


def outcome_of(item, points) -> runner.Outcome:
    return runner.run_benchmark(item, points, 2, fake_facts(), LIMITS)


class TestTiming:
    def test_providers_take_turns_and_minima_and_medians_are_kept(self):
        calls: list[str] = []
        times = iter(range(1000))
        durations = {"a": iter([0, 0, 5, 1, 3]), "b": iter([0, 0, 7, 9, 8])}
        now = [0.0]

        def clock() -> float:
            return now[0]

        def call(name: str):
            def run() -> None:
                next(times)
                calls.append(name)
                now[0] += next(durations[name])

            return run

        figures, inner = time_in_turns({"a": call("a"), "b": call("b")}, 3, inner=1, clock=clock)
        assert inner == 1
        assert calls == ["a", "b"] * 5
        assert figures["a"].as_dict() == {"min": 1000.0, "median": 3000.0}
        assert figures["b"].as_dict() == {"min": 7000.0, "median": 8000.0}

    def test_preparation_is_outside_the_clock(self):
        now = [0.0]

        def before(name: str) -> str:
            now[0] += 100
            return name * 2

        def call(state: str) -> None:
            assert state == "aa"
            now[0] += 1

        figures, inner = time_in_turns({"a": call}, 2, before=before, clock=lambda: now[0])
        assert (figures["a"].min, inner) == (1000.0, 1)

    def test_other_units_are_what_the_providers_return(self):
        values = iter([3.0, 1.0, 2.0])
        assert measure_in_turns({"a": lambda: next(values)}, 3)["a"].as_dict() == {"min": 1.0, "median": 2.0}


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self.log, self.at = log, -1

    def record(self) -> None:
        self.at = len(self.log)
        self.log.append("event")

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


class FakeGpu:
    """Keeps what was queued, in its order; an event's time is its place there."""

    def __init__(self) -> None:
        self.queued: list[str] = []

    def event(self) -> FakeEvent:
        return FakeEvent(self.queued)

    def hold(self) -> None:
        self.queued.append("hold")

    def empty_l2(self) -> None:
        self.queued.append("empty L2")

    def synchronize(self) -> None:
        self.queued.append("wait")


class TestGpu:
    @pytest.mark.parametrize("cold", [False, True])
    def test_only_the_call_is_between_the_events(self, cold: bool):
        device = FakeGpu()
        providers = {"base": lambda: device.queued.append("base"), "two": lambda: device.queued.extend("ab")}
        figures = gpu.time_by_events(providers, 2, cold, device)
        before = ["hold", "empty L2", "event"] if cold else ["hold", "event"]
        turn = [*before, "base", "event", "wait", *before, "a", "b", "event", "wait"]
        assert device.queued[-2 * len(turn) :] == turn * 2
        assert device.queued[: -2 * len(turn)] == ["base"] * gpu.WARM_UPS + ["a", "b"] * gpu.WARM_UPS
        assert (figures["base"].min, figures["two"].median) == (2.0, 3.0)

    def test_without_a_gpu_it_is_said(self):
        lacking = gpu.unusable()
        if not lacking:
            pytest.skip("this machine has a GPU and kernels for it")
        item = discovery.discover()["gpu_lora"]
        out = io.StringIO()
        print_outcome(runner.run_benchmark(item, item.points(False), 1, fake_facts(), None), Console(file=out))
        assert f"gpu_lora: skipped: {lacking}" in " ".join(out.getvalue().split())

    @pytest.mark.parametrize("name", ["gpu_lora", "gpu_pools"])
    def test_the_cases_are_right(self, name: str, monkeypatch):
        """On the CPU, small, with times of a device that is none."""
        item = discovery.discover()[name]
        monkeypatch.setitem(item.build.__globals__, "DEVICE", "cpu")
        monkeypatch.setattr(gpu, "TorchCuda", FakeGpu)
        small = {"tokens": 66, "adapters": 3} if name == "gpu_pools" else {"direction": "train", "rows": 5}
        points = [item.complete({"width": 64, "rank": 4} | more) for more in ({"l2": "cold"}, small)]
        outcome = runner.run_benchmark(dataclasses.replace(item, needs=None), points, 1, fake_facts(), None)
        assert not outcome.failure
        assert all({"base", "pylora"} <= set(record["figures"]) for record in outcome.records)
        assert len(outcome.records) == 2


class TestRunning:
    def test_a_wrong_op_gets_no_figure(self):
        outcome = outcome_of(wrong, [{}])
        assert outcome.records == []
        assert "wrong result" in outcome.failure

    def test_a_case_that_raises_says_what(self):
        @benchmark(base="")
        def broken() -> Work:
            """Raises."""
            raise RuntimeError("no such thing")

        assert outcome_of(broken, [{}]).failure == "broken: RuntimeError: no such thing"

    def test_record(self, tmp_path: Path):
        (record,) = outcome_of(product, [product.complete({"rows": 4})]).records
        assert record["parameters"] == {"rows": 4, "width": 3}
        assert set(record["figures"]) == {"base", "pylora", "peft"}
        assert set(record["figures"]["base"]) == {"min", "median"}
        assert record["cost"]["pylora"] == {"flops": 36, "bytes": 16}
        assert record["floor"]["pylora"] == pytest.approx(max(36 / 100, 16 / 50) / 1e6)
        assert record["threads"] == 1
        (path,) = records.append([record, record], tmp_path)
        assert path.name == "product.jsonl"
        assert [json.loads(line) for line in path.read_text().splitlines()] == [record, record]
        assert records.read([path]) == [record]

    def test_a_limit_is_recorded_and_shown_where_it_is_exceeded(self):
        limited = dataclasses.replace(product, limit=lambda rows, width: rows / width)
        outcome = outcome_of(limited, [{"rows": 2, "width": 4}, {"rows": 8, "width": 4}])
        for record in outcome.records:
            record["figures"]["pylora"]["min"] = record["figures"]["base"]["min"]
        assert [record["limit"] for record in outcome.records] == [0.5, 2.0]
        assert [exceeds_limit(record) for record in outcome.records] == [True, False]
        console = Console(record=True, width=200)
        print_outcome(outcome, console)
        text = console.export_text()
        assert "0.50 <" in text
        assert "2.00 <" not in text
        assert "1 of 2 cases are above their limit" in text

    def test_broken_file_of_records(self, tmp_path: Path):
        path = tmp_path / "x.jsonl"
        path.write_text("[1]\n")
        with pytest.raises(ValueError, match=r"expected a JSON object in line 1"):
            records.read([path])

    def test_threads_are_set_back(self):
        before = torch.get_num_threads()
        session.run_plan([(product, [product.complete({})])], threads=before + 1, repeat=1)
        assert torch.get_num_threads() == before


class TestChoosing:
    def test_an_axis_that_there_is_not(self):
        with pytest.raises(ValueError, match="expected axes among rows, width, got rank"):
            product.complete({"rank": 3})
        assert selection.choose_points(product, {"rank": [3]}) == []

    def test_points_of_the_table_and_of_the_sweeps(self):
        assert product.points(sweeps=False) == [{"rows": 2, "width": 3}, {"rows": 4, "width": 3}]
        assert [point["rows"] for point in selection.choose_points(product, {"rows": [1]}, sweeps=True)] == [1, 1]

    def test_grid_makes_points(self):
        points = selection.choose_points(product, {"rows": [7, 8], "width": [5]}, grid=True)
        assert points == [{"rows": 7, "width": 5}, {"rows": 8, "width": 5}]

    @pytest.mark.parametrize("text", ["x", "0", "1,,2", "-3"])
    def test_numbers(self, text: str):
        with pytest.raises(selection.SelectionError, match="--rows: expected positive integers"):
            selection.numbers("--rows", text)

    def test_dtypes(self):
        assert selection.dtypes("bf16, float32") == ["bfloat16", "float32"]
        with pytest.raises(selection.SelectionError, match="got int8"):
            selection.dtypes("int8")

    def test_every_file_of_cases_is_found_and_its_points_fit(self):
        found = discovery.discover()
        files = list(discovery.CHECKOUT.glob("*/bench_*.py"))
        assert len(files) >= 3
        assert {"lora", "generate", "saved_activations"} <= set(found)
        assert all(item.summary and item.points(sweeps=True) for item in found.values())

    def test_own_file(self, tmp_path: Path):
        path = tmp_path / "bench_mine.py"
        path.write_text("x = 1\n")
        with pytest.raises(ValueError, match="expected a function under @benchmark"):
            discovery.discover([path])
        path.write_text(
            "from pylora.bench import Work, benchmark\n\n@benchmark(base='')\ndef mine(rows: int = 1) -> Work:\n"
            "    return Work({'pylora': lambda: None}, lambda: None)\n"
        )
        assert discovery.discover([path])["mine"].axes == {"rows": 1}


def test_cost_of_a_small_product_counted_by_hand():
    # x [2, 3], W [4, 3], A [5, 3], B [4, 5]: 2·2·3·4 + 2·2·5·(3+4) operations, 6 + 12 + 8 and 15 + 20 numbers.
    assert lora_cost.forward(2, 3, 4, 5) == Cost(48 + 140, 4 * (26 + 35))
    assert lora_cost.forward(2, 3, 4, 0, "bfloat16") == Cost(48, 52)
    # dX: the dense product again; G, G A, Gᵀ x, dYᵀ v: twice the forward's low-rank operations.
    assert lora_cost.backward(2, 3, 4, 5).flops == 48 + 280


def test_floor_by_operations_of_a_training_step():
    step, base = lora_cost.train(512, 2048, 2048, 16), lora_cost.train(512, 2048, 2048, 0)
    assert step.flops / base.flops == pytest.approx(1 + 1.5 * 16 * 4096 / 2048**2)


def test_floor_takes_the_cache_for_what_fits_it():
    assert LIMITS.milliseconds(Cost(0, 50_000)) == pytest.approx(1e-3)
    assert LIMITS.milliseconds(Cost(0, 10**12)) == pytest.approx(10**12 / 10 / 1e6)


def test_plots_are_written_whole(tmp_path: Path):
    outcome = outcome_of(product, product.points(sweeps=True))
    paths = draw([outcome], tmp_path / "new")
    assert [path.name for path in paths] == ["product_rows.png", "product_roofline.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)


def test_a_single_point_is_no_line(tmp_path: Path):
    assert [path.name for path in draw([outcome_of(product, [product.complete({})])], tmp_path)] == [
        "product_roofline.png"
    ]
