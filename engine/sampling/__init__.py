"""From logits to tokens, each rank on its shard of the vocabulary."""
