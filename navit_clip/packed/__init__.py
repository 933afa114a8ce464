"""What a packed sequence is: segments, packed images and captions, batches."""
