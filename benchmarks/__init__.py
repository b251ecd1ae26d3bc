"""Speed and memory beside others: `stages`, a `bench_` module for each, `peers` for theirs."""
