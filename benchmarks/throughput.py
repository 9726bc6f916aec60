"""Pictures per second of feature extraction, against the bare forward pass of the same batches.

python benchmarks/throughput.py

Expected (2-core machine with bfloat16): steady state 0.57 to 0.63, first to last 0.62 to 0.72.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import write_pictures
from headstart import backbones, embedders, features, loading
from headstart.images import open_image
from headstart.zoo import Spec

AIM = 0.70


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000, help="how many JPEGs of 500 x 375 [default: 2000]")
    parser.add_argument("--runs", type=int, default=3, help="how often each is measured [default: 3]")
    given = parser.parse_args()

    located = backbones.locate("auto")
    device = embedders.resolve_device("auto")
    precision = embedders.resolve_precision("auto", device)
    embedder = embedders.prepare(backbones.load(located), device, precision)
    size = located.spec.preprocess.size
    # Threads decode so many pictures ahead (as in `loading.process`). When the first picture is delivered they are
    # decoded already, and for as many at the end nothing is left to decode: the steady state stops before those.
    window = max(4 * loading.BATCH_SIZE, loading.LOOK_AHEAD_BYTES // (3 * size * size))
    if given.pictures < 1.5 * window:
        parser.error(f"--pictures must be {int(1.5 * window)} or more: {window} are decoded ahead")

    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        paths = write_pictures(Path(folder, "pictures"), given.pictures)
        pixels = np.stack([located.spec.preprocess.apply(open_image(path)) for path in paths[:512]])
        steady, whole, bare = [], [], []
        for number in range(given.runs):
            bare.append(time_forward(embedder, pixels, given.pictures))
            times = time_extract(paths, located.spec, embedder, f"{precision}-{device.type}", Path(folder, f"{number}"))
            last = len(times) - window - 1
            steady.append(last / (times[last] - times[0]))
            whole.append((len(times) - 1) / (times[-1] - times[0]))

    rows = (
        ("bare forward pass", bare),
        ("extraction, steady state: as many decoded as computed", steady),
        ("extraction, first to last delivered picture", whole),
    )
    print(f"{given.pictures} JPEGs of 500 x 375; {located.spec.name}, {precision} on {device}, batches of")
    print(f"{loading.BATCH_SIZE}, {loading.count_cpus()} threads; alternating, median of {given.runs}\n")
    print("| | pictures a second | of the bare forward pass |")
    print("| --- | --- | --- |")
    for name, rates in rows:
        share = statistics.median(rate / base for rate, base in zip(rates, bare, strict=True))
        print(f"| {name} | {statistics.median(rates):.0f} | {share:.2f} |")
    print(f"\nThe steady state should be {AIM:.2f} of the bare forward pass or more.")


def time_forward(embedder: embedders.Embedder, pixels: np.ndarray, count: int) -> float:
    """Pictures per second of the network alone, with as many threads as `loading.process` has."""
    size, batches = loading.BATCH_SIZE, -(-count // loading.BATCH_SIZE)
    starts = [number * size % (len(pixels) - size + 1) for number in range(batches)]
    with ThreadPoolExecutor(loading.count_cpus()) as executor:
        compute = executor.map(lambda start: embedder(pixels[start : start + size]), starts[: 2 * loading.count_cpus()])
        list(compute)  # threads started, kernels chosen
        begin = time.perf_counter()
        list(executor.map(lambda start: embedder(pixels[start : start + size]), starts))
        return batches * size / (time.perf_counter() - begin)


def time_extract(paths: list[Path], spec: Spec, embedder: embedders.Embedder, form: str, cache: Path) -> list[float]:
    """When `features.extract` delivered each picture."""
    times: list[float] = []

    def track(pictures: Iterable[loading.Picture], total: int) -> Iterator[loading.Picture]:
        for picture in pictures:
            times.append(time.perf_counter())
            yield picture

    sources = [str(path) for path in paths]
    features.extract(paths, sources, spec, lambda: form, lambda: embedder, cache, track=track)
    return times


if __name__ == "__main__":
    main()
