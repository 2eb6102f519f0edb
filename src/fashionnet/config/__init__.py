"""What decides a run: the schema and its checks, composing with Hydra, what may be built."""
