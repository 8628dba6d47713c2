"""Run all benchmarks (`make bench`). They print ratios and do not judge them."""

from tests.benchmarks import (
    bench_analysis,
    bench_data,
    bench_methods,
    bench_step,
    bench_stream,
    bench_strong,
    bench_sweep,
    bench_teachers,
)

ALL = (
    bench_data,
    bench_strong,
    bench_stream,
    bench_step,
    bench_sweep,
    bench_teachers,
    bench_methods,
    bench_analysis,
)

if __name__ == "__main__":
    for benchmark in ALL:
        benchmark.main()
