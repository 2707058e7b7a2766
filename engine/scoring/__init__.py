"""Run all members on a batch and average their probabilities, on the CPU or the GPU."""
