"""One run of the sampler: its options, its start, its loop, captured or not, and the methods built
on it."""
