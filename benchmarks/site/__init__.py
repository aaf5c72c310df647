"""One page and README's table from all records of `benchmarks/results`."""
