"""Run all benchmarks (`make bench`). They print ratios and do not judge them."""

from tests.benchmarks import bench_analysis, bench_data, bench_step, bench_stream, bench_sweep

if __name__ == "__main__":
    for benchmark in (bench_data, bench_stream, bench_step, bench_sweep, bench_analysis):
        benchmark.main()
