"""The GPU step: decoding, slots and streams, the fused kernel. Imported only when a GPU is chosen."""
