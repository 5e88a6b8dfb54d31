"""Times in interleaved rounds, and peaks of memory."""
import statistics
import time

import torch

WARM_UPS = 5
ROUNDS = 30
COLD_BYTES = 180e6  # three times the largest L2: sets of buffers that a round goes through
SHORT_SECONDS = 100e-6  # calls shorter than this are timed ten at a time


class Clock:
    """CUDA events around calls that wait behind a sleeping kernel, so that the host's work is not in the time; on a CPU wall clocks."""

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"

    def seconds(self, calls, ahead=0.0):
        """How long `calls` take together. `ahead`: seconds that the device sleeps first, while the host hands everything over."""
        if not self.cuda:
            begun = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - begun
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(int(ahead * 2e9))
        first.record()
        for call in calls:
            call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def host_seconds(self, calls):
        """How long the host needs to hand `calls` over."""
        begun = time.perf_counter()
        for call in calls:
            call()
        took = time.perf_counter() - begun
        if self.cuda:
            torch.cuda.synchronize()
        return took


def buffer_sets(num_bytes):
    return max(1, min(32, -(-int(COLD_BYTES) // max(1, num_bytes))))


def interleave(sides, clock, rounds=ROUNDS, warm_ups=WARM_UPS):
    """`sides` has by name a list of calls, one a set of buffers. Round for round every side is timed, in odd rounds in the opposite
    order. Seconds of a call by side, [rounds]; rounds in which one took twice its median are left out."""
    turns, ahead, count = {}, {}, {}
    for name, calls in sides.items():
        for index in range(warm_ups):
            calls[index % len(calls)]()
        once = clock.seconds([calls[0]])
        count[name] = 10 if once < SHORT_SECONDS else 1
        ahead[name] = 1.3 * count[name] * clock.host_seconds([calls[0]])
        turns[name] = 0
    times = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            calls = sides[name]
            some = [calls[(turns[name] + index) % len(calls)] for index in range(count[name])]
            turns[name] += count[name]
            times[name].append(clock.seconds(some, min(ahead[name], 0.05)) / count[name])
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    kept = [i for i in range(rounds) if all(taken[i] <= 2 * medians[name] for name, taken in times.items())] or list(range(rounds))
    return {name: [taken[i] for i in kept] for name, taken in times.items()}


def spread(values):
    """Median and the 10th and 90th percentile."""
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
    return {"median": statistics.median(ordered), "p10": at(0.1), "p90": at(0.9)}


def peak_bytes(call):
    """The most memory that `call` takes beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
