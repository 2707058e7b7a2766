"""Execute one member: uint8 pixels to float32 logits, one module per back end."""
