"""Text in, batches out: corpus, tokenizer, shards, packing, loader."""
