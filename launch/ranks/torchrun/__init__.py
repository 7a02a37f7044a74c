"""What ranks that torchrun started do for themselves, because nobody of ours supervises them."""
