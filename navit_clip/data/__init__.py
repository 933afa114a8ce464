"""Data: shards to samples to decoded, sized, dropped, tokenised and packed batches."""
