"""A pre-training recipe whose batch is counted in tokens, and is a promise."""
