"""The dataset: rows, shards, manifest, the epoch plan and the stream that runs it."""
