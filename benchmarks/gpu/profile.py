"""Where the time of a layer goes: kernels of two waves and of two solves, by torch's profiler.

Two waves only: a whole layer has hundreds of thousands of events, and their evaluation takes longer than the layer.
"""

import tempfile
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks import layer_70b
from benchmarks.gpu import layer
from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune.solvers.allocation.allocation import Share

KERNELS, LOGGED = 8, 40  # of each part, by their time: in the table, and in the log
SOLVES = {"o_proj": 1, "down_proj": 3}  # places of inputs: the smallest whole solve, and the longest


def run(setting: Setting, rows: Rows) -> None:
    args = layer.options(setting, "--samples", "4")
    with tempfile.TemporaryDirectory() as folder:
        layer_70b.make_checkpoint(folder, layer_70b.llama(args), args.device)
        worker = layer_70b.worker_of(folder, f"{folder}/out", args)
        layer_70b.give_waves(worker, args)
        worker.accumulate(layer_70b.STREAM, 0, 0, False)  # loads the kernels

        def waves() -> None:
            for wave in range(2):
                worker.accumulate(layer_70b.STREAM, wave, 0, False)

        _profile("two waves", waves, setting, rows)
        for name, place in SOLVES.items():
            shares = dict.fromkeys(worker.skeleton.family.kinds[0].inputs[place], Share(args.sparsity))

            def solve(place: int = place, shares: dict[str, Share] = shares) -> None:
                worker.solve(0, place, shares)

            _profile(f"solve {name}", solve, setting, rows)


def _profile(label: str, work: Callable[[], object], setting: Setting, rows: Rows) -> None:
    activities = [ProfilerActivity.CUDA if setting.cuda else ProfilerActivity.CPU]
    setting.synchronize()
    with profile(activities=activities, acc_events=True) as profiler:
        work()
        setting.synchronize()
    events = profiler.key_averages()

    def microseconds(event) -> float:
        return event.self_device_time_total if setting.cuda else event.self_cpu_time_total

    events = sorted(events, key=microseconds, reverse=True)
    for event in events[:LOGGED]:
        print(f"{label}: {microseconds(event) / 1e3:9.3f} ms, {event.count:6} calls, {event.key}")
    for event in events[:KERNELS]:
        rows.add(f"{label}: {event.key[:90]}", microseconds(event) / 1e3, f"ms, {event.count} calls")
    rows.add(f"{label}: all kernels", sum(map(microseconds, events)) / 1e3, "ms")
    rows.add(f"{label}: number of kernels", sum(event.count for event in events))
